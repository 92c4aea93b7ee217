"""Lists of what is marked in a map: fixed capacity and counts, no host sync."""

from torch import Tensor

from sparse_patch.kernels.availability import prefers_triton


def compact(marked: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The marked values of each row, in order, at the front of a list as long as the row.

    Args:
        marked: bool `[B, H, Q, n]`.
        values: int32 `[B, H, Q, n]`, expanded or not.

    Returns:
        The lists, int32 `[B, H, Q, n]`, of which the first `counts` entries have a meaning; the counts, int32
        `[B, H, Q]`.
    """
    if prefers_triton(marked):
        from sparse_patch.kernels.compaction.triton import compact as by_kernel

        return by_kernel(marked, values)
    from sparse_patch.kernels.compaction.torch import compact as in_lists

    return in_lists(marked, values)
