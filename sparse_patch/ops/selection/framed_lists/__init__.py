"""Lists of the first tokens, chosen blocks between, and the last tokens, as pages: the lists of Kinetics."""

from torch import Tensor

from sparse_patch.kernels.availability import prefers_triton
from sparse_patch.ops.selection.framed_lists.frame import Frame

__all__ = ["Frame", "framed_pages"]


def framed_pages(blocks: Tensor, counts: Tensor, lengths: Tensor, capacity: int, frame: Frame) -> tuple[Tensor, Tensor]:
    """The sinks, the chosen blocks and everything after the last block to choose from, as pages.

    Args:
        blocks: int32 `[B, L, n]`, of which the first `counts` are chosen; block 0 begins after the sinks.
        counts: int32 `[B, L]`.
        lengths: tokens of each row, int64 `[B]`.
        capacity: the most tokens that a row can have (a Python int).
        frame: the sizes of sinks, blocks and window.

    Returns:
        Arguments of `PagePlan.of`: pages, int32 `[B, L, K]`, in the order of the blocks, and counts, int32 `[B, L]`.
    """
    if prefers_triton(blocks):
        from sparse_patch.ops.selection.framed_lists.triton import framed_pages as pages
    else:
        from sparse_patch.ops.selection.framed_lists.torch import framed_pages as pages
    return pages(blocks, counts, lengths, capacity, frame)
