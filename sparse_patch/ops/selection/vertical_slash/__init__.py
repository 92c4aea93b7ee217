"""Which block columns and diagonals hold the attention of a head's last queries, and the plans made from them."""

from torch import Tensor

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.availability import prefers_triton
from sparse_patch.ops.backends import fastest
from sparse_patch.ops.selection.vertical_slash.params import QueryAware, VerticalSlashParams
from sparse_patch.plans import BlockGrid, BlockPlan

__all__ = ["QueryAware", "VerticalSlashParams", "choose_vertical_slash", "plan_of_vertical_slash"]


def choose_vertical_slash(
    call: AttentionCall, grid: BlockGrid, mean_k: Tensor, rule: VerticalSlashParams
) -> tuple[Tensor, Tensor, Tensor]:
    """The columns and diagonals that each head takes, by the attention of its last block of queries.

    Args:
        call: the attention call; every row that matters has more tokens than a block.
        grid: its grid.
        mean_k: mean keys of the blocks, float32 `[B, Hkv, N, D]`.
        rule: what to take.

    Returns:
        The key blocks that every query block reads, bool `[B, Hq, N]`; the distances in blocks at which every query
        block reads one, bool `[B, Hq, N]` (index 0 of both is always taken; ties go to the lower index); and which
        heads are query-aware, bool `[B, Hq]`.
    """
    if fastest(call) == "triton":
        from sparse_patch.ops.selection.vertical_slash.triton import choose_vertical_slash as choose
    else:
        from sparse_patch.ops.selection.vertical_slash.torch import choose_vertical_slash as choose
    return choose(call, grid, mean_k, rule)


def plan_of_vertical_slash(verticals: Tensor, slashes: Tensor, aware: QueryAware | None, grid: BlockGrid) -> BlockPlan:
    """The plan of the blocks in some columns, on some diagonals, and of those that query-aware heads choose one by one.

    Args:
        verticals: key blocks that every query block reads, bool `[B, Hq, N]`.
        slashes: distances in blocks at which every query block reads a key block, bool `[B, Hq, N]`.
        aware: the heads that also choose block by block; None if no head does.
        grid: the grid of the call.
    """
    if prefers_triton(verticals) and (aware is None or fastest(aware.call) == "triton"):
        from sparse_patch.ops.selection.vertical_slash.triton import plan_of_vertical_slash as plan
    else:
        from sparse_patch.ops.selection.vertical_slash.torch import plan_of_vertical_slash as plan
    return plan(verticals, slashes, aware, grid)
