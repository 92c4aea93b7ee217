"""Benchmarks: prefill of one layer, decode of one layer and of all layers, and a whole model through `generate`."""
