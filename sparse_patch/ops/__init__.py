"""Ops: `attention` executes plans, `selection` scores keys for methods."""
