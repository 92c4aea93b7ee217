"""Everything that touches a Transformers model: the hook, what it reads from masks and caches, and patching."""
