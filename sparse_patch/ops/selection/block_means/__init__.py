"""Means of queries and keys over the real tokens of a grid's blocks, and how similar these tokens are to each other.

The self-similarity of a block is the mean cosine of all ordered pairs of its tokens, including a token with itself: the
squared length of the sum of its unit vectors, divided by the squared number of its tokens. It lies in [0, 1]: 1 if all
tokens point in one direction, 0 for blocks that a row does not have. A zero vector has a cosine of 0 with everything.

Tokens are float16, bfloat16 or float32, of any strides; sums are float32.
"""

from torch import Tensor

from sparse_patch.kernels.availability import prefers_triton
from sparse_patch.plans import BlockGrid


def key_means(k: Tensor, grid: BlockGrid) -> Tensor:
    """Mean key of each block, float32 `[B, Hkv, N, D]` for keys `[B, Hkv, Skv, D]`; 0 for missing blocks."""
    if prefers_triton(k):
        from sparse_patch.ops.selection.block_means.triton import key_means as of_blocks
    else:
        from sparse_patch.ops.selection.block_means.torch import key_means as of_blocks
    return of_blocks(k, grid)


def key_similarities(k: Tensor, grid: BlockGrid, center: Tensor) -> Tensor:
    """Self-similarity of each block of the keys minus `center`, one vector for each row and head.

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
