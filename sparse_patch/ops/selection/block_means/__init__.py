"""Means of queries and keys over the blocks of a grid, of the tokens that a block really has, and how alike those are.

The self-similarity of a block is the mean cosine of all ordered pairs of its tokens, a token with itself included: the
squared length of the sum of its unit vectors, over the squared number of its tokens. It lies in [0, 1]; 1 for tokens
that all point one way, 0 for blocks that a row lacks. A zero vector has a cosine of 0 with everything.

Sums are float32, from float16, bfloat16 or float32 tokens of any strides.
"""

from torch import Tensor

from sparse_patch.kernels.availability import prefers_triton
from sparse_patch.plans import BlockGrid


def key_means(k: Tensor, grid: BlockGrid) -> Tensor:
    """Mean key of each block, float32 `[B, Hkv, N, D]` for keys `[B, Hkv, Skv, D]`; 0 for blocks a row lacks."""
    if prefers_triton(k):
        from sparse_patch.ops.selection.block_means.triton import key_means as of_blocks
    else:
        from sparse_patch.ops.selection.block_means.torch import key_means as of_blocks
    return of_blocks(k, grid)


def key_similarities(k: Tensor, grid: BlockGrid, center: Tensor) -> Tensor:
    """Self-similarity of each block of the keys less `center`, a vector for each row and head.

    Args:
        k: `[B, Hkv, Skv, D]`.
        grid: the grid of the blocks.
        center: float32 `[B, Hkv, D]`.

    Returns:
        Float32 `[B, Hkv, N]`.
    """
    if prefers_triton(k):
        from sparse_patch.ops.selection.block_means.triton import key_similarities as of_blocks
    else:
        from sparse_patch.ops.selection.block_means.torch import key_similarities as of_blocks
    return of_blocks(k, grid, center)


def query_means(q: Tensor, grid: BlockGrid) -> Tensor:
    """Mean query of each query block, float32 `[B, Hq, NQ, D]` for queries `[B, Hq, Sq, D]`; 0 for empty blocks."""
    if prefers_triton(q):
        from sparse_patch.ops.selection.block_means.triton import query_means as of_blocks
    else:
        from sparse_patch.ops.selection.block_means.torch import query_means as of_blocks
    return of_blocks(q, grid)


def query_means_and_similarities(q: Tensor, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """`query_means`, and the self-similarity of each query block, float32 `[B, Hq, NQ]`, in one pass over `q`."""
    if prefers_triton(q):
        from sparse_patch.ops.selection.block_means.triton import query_means_and_similarities as of_blocks
    else:
        from sparse_patch.ops.selection.block_means.torch import query_means_and_similarities as of_blocks
    return of_blocks(q, grid)
