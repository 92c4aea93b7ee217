"""Benchmarks: one layer's prefill, decode of one layer and of all, and a whole model through `generate`."""
