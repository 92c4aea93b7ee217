"""Triton backend: `prefill` chooses for every token of a prompt, `decode` scores blocks for the token being decoded."""

from sparse_patch.ops.selection.compressed_keys.triton.decode import block_scores
from sparse_patch.ops.selection.compressed_keys.triton.prefill import choose, why_unsupported

__all__ = ["block_scores", "choose", "why_unsupported"]
