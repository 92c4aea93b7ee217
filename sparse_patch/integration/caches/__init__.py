"""KV caches that make sparse decode worthwhile: Transformers' own caches with our layers."""
