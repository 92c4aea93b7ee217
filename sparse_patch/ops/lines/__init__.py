"""Which columns and diagonals of blocks hold the attention of a head's last queries, and the plans that they make."""

from torch import Tensor

from sparse_patch.call import AttentionCall
from sparse_patch.ops.backends import fastest, takes_triton
from sparse_patch.ops.lines.rules import LineRule, QueryAware
from sparse_patch.plans import BlockGrid, BlockPlan

__all__ = ["LineRule", "QueryAware", "choose_lines", "plan_of_lines"]


def choose_lines(call: AttentionCall, grid: BlockGrid, mean_k: Tensor, rule: LineRule) -> tuple[Tensor, Tensor, Tensor]:
    """What each head takes by the attention of the last block of queries.

    Args:
        call: the attention call; every row that matters has more tokens than a block.
        grid: its grid.
        mean_k: mean keys of the blocks, float32 `[B, Hkv, N, D]`.
        rule: what to take.

    Returns:
        The key blocks that every query block reads, bool `[B, Hq, N]`; the distances in blocks at which every query
        block reads one, bool `[B, Hq, N]` (number 0 of both always is taken; ties go to the lower number); and which
        heads are query-aware, bool `[B, Hq]`.
    """
    if fastest(call) == "triton":
        from sparse_patch.ops.lines.triton import choose_lines as choose
    else:
        from sparse_patch.ops.lines.torch import choose_lines as choose
    return choose(call, grid, mean_k, rule)


def plan_of_lines(verticals: Tensor, slashes: Tensor, aware: QueryAware | None, grid: BlockGrid) -> BlockPlan:
    """The blocks in some columns, on some diagonals, and those that query-aware heads choose one by one.

    Args:
        verticals: key blocks that every query block reads, bool `[B, Hq, N]`.
        slashes: distances in blocks at which every query block reads a key block, bool `[B, Hq, N]`.
        aware: the heads that choose block by block as well; None for none.
        grid: the grid of the call.
    """
    if takes_triton(verticals) and (aware is None or fastest(aware.call) == "triton"):
        from sparse_patch.ops.lines.triton import plan_of_lines as plan
    else:
        from sparse_patch.ops.lines.torch import plan_of_lines as plan
    return plan(verticals, slashes, aware, grid)
