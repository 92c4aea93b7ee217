"""The (query, key) pairs of lists of pages, for the report. `PagePlan.computed_pairs` is the same in PyTorch."""
