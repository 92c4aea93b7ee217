"""Means of queries and keys over the blocks of a grid, of the tokens that a block really has."""

from torch import Tensor

from sparse_patch.ops.backends import takes_triton
from sparse_patch.plans import BlockGrid


def key_means(k: Tensor, grid: BlockGrid) -> Tensor:
    """Mean key of each block, float32 `[B, Hkv, N, D]` for keys `[B, Hkv, Skv, D]`; 0 for blocks a row lacks."""
    if takes_triton(k):
        from sparse_patch.ops.block_means.triton import key_means as means
    else:
        from sparse_patch.ops.block_means.torch import key_means as means
    return means(k, grid)


def query_means(q: Tensor, grid: BlockGrid) -> Tensor:
    """Mean query of each query block, float32 `[B, Hq, NQ, D]` for queries `[B, Hq, Sq, D]`; 0 for empty blocks."""
    if takes_triton(q):
        from sparse_patch.ops.block_means.triton import query_means as means
    else:
        from sparse_patch.ops.block_means.torch import query_means as means
    return means(q, grid)
