"""Triton backend: `prompt` chooses for every token of a prompt, `step` scores blocks for the one that is decoded."""

from sparse_patch.ops.compressed_keys.triton.prompt import choose, unsupported
from sparse_patch.ops.compressed_keys.triton.step import block_scores

__all__ = ["block_scores", "choose", "unsupported"]
