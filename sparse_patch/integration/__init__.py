"""Everything that touches a model of Transformers: the hook, what it reads off masks and caches, patching."""
