"""Means of queries and keys over the blocks of a grid, of the tokens that a block really has, and how alike those are.

The self-similarity of a block is the mean cosine of all ordered pairs of its tokens, a token with itself included: the
squared length of the sum of its unit vectors, over the squared number of its tokens. It lies in [0, 1]; 1 for tokens
that all point one way, 0 for blocks that a row lacks. A zero vector has a cosine of 0 with everything.

Sums are float32, from float16, bfloat16 or float32 tokens of any strides.
"""

from types import ModuleType

from torch import Tensor

from sparse_patch.ops.backends import takes_triton
from sparse_patch.plans import BlockGrid


def key_means(k: Tensor, grid: BlockGrid) -> Tensor:
    """Mean key of each block, float32 `[B, Hkv, N, D]` for keys `[B, Hkv, Skv, D]`; 0 for blocks a row lacks."""
    means: Tensor = _backend(k).key_means(k, grid)
    return means


def key_similarities(k: Tensor, grid: BlockGrid, center: Tensor) -> Tensor:
    """Self-similarity of each block of the keys less `center`, a vector for each row and head.

    Args:
        k: `[B, Hkv, Skv, D]`.
        grid: the grid of the blocks.
        center: float32 `[B, Hkv, D]`.

    Returns:
        Float32 `[B, Hkv, N]`.
    """
    similarities: Tensor = _backend(k).key_similarities(k, grid, center)
    return similarities


def query_means(q: Tensor, grid: BlockGrid) -> Tensor:
    """Mean query of each query block, float32 `[B, Hq, NQ, D]` for queries `[B, Hq, Sq, D]`; 0 for empty blocks."""
    means: Tensor = _backend(q).query_means(q, grid)
    return means


def query_means_and_similarities(q: Tensor, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """`query_means`, and the self-similarity of each query block, float32 `[B, Hq, NQ]`, in one pass over `q`."""
    both: tuple[Tensor, Tensor] = _backend(q).query_means_and_similarities(q, grid)
    return both


def _backend(x: Tensor) -> ModuleType:
    if takes_triton(x):
        from sparse_patch.ops.block_means import triton as backend
    else:
        from sparse_patch.ops.block_means import torch as backend
    return backend
