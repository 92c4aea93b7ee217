"""Decode steps as CUDA graphs: one launch in place of thousands, while nothing changes that the graph relies on."""
