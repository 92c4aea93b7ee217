"""KV caches that sparse decode pays on: Transformers' own caches with layers of ours."""
