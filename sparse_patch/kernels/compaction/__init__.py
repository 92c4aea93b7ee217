"""Lists of the marked entries of a map, with fixed capacity and counts, without a host sync."""

from torch import Tensor

from sparse_patch.kernels.availability import prefers_triton


def compact(marked: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The marked values of each row, in order, at the front of a list as long as the row.

    Args:
        marked: bool `[B, H, Q, n]`.
        values: int32 `[B, H, Q, n]`; may be expanded.

    Returns:
        The lists, int32 `[B, H, Q, n]`, whose first `counts` entries are valid, and the counts, int32 `[B, H, Q]`.
    """
    if prefers_triton(marked):
        from sparse_patch.kernels.compaction.triton import compact as by_kernel

        return by_kernel(marked, values)
    from sparse_patch.kernels.compaction.torch import compact as in_lists

    return in_lists(marked, values)
