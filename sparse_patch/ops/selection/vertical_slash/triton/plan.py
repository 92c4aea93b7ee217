"""Triton kernel that writes the lists of a plan: one program for each query block of each head."""

from typing import Any

import torch
import triton
import triton.language as tl

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import launch_op
from sparse_patch.kernels.pieces import query_blocks_of_row
from sparse_patch.ops.selection.vertical_slash.params import QueryAware
from sparse_patch.ops.selection.vertical_slash.triton.cut import PooledCut
from sparse_patch.plans import BlockGrid, BlockPlan


def plan_of_vertical_slash(
    verticals: torch.Tensor, slashes: torch.Tensor, aware: QueryAware | None, grid: BlockGrid
) -> BlockPlan:
    """See `ops.selection.vertical_slash`."""
    if torch.compiler.is_compiling():
        indices, counts = _lists_in_a_graph(verticals, slashes, aware, grid)
    else:
        indices, counts = _lists(verticals, slashes, aware, grid)
    return BlockPlan(indices, counts, grid)


def _lists_in_a_graph(
    verticals: torch.Tensor, slashes: torch.Tensor, aware: QueryAware | None, grid: BlockGrid
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_lists` as an op, which takes tensors and numbers."""
    given: Any = (verticals, slashes, grid.row_starts)
    given += grid.q_length, grid.kv_length, grid.q_start, grid.padded, grid.block_size
    if aware is not None:
        given += aware.call.q, aware.call.k, aware.call.scale, aware.call.softcap
        given += aware.heads, aware.mean_k, aware.gamma, aware.each_row, aware.max_blocks
    lists: tuple[torch.Tensor, torch.Tensor] = lists_of_lines(*given)
    return lists


def _room(verticals: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, num_blocks = verticals.shape
    room = batch, heads, grid.num_query_blocks
    indices = torch.empty(*room, num_blocks, dtype=torch.int32, device=verticals.device)
    return indices, torch.empty(room, dtype=torch.int32, device=verticals.device)


def _outputs(
    verticals: torch.Tensor,
    row_starts: torch.Tensor,
    q_length: int,
    kv_length: int,
    q_start: int,
    padded: bool,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _room(verticals, BlockGrid(len(verticals), q_length, kv_length, q_start, row_starts, padded, block_size))


@launch_op("lists_of_lines", _outputs)
def lists_of_lines(
    verticals: torch.Tensor,
    slashes: torch.Tensor,
    row_starts: torch.Tensor,
    q_length: int,
    kv_length: int,
    q_start: int,
    padded: bool,
    block_size: int,
    q: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    heads: torch.Tensor | None = None,
    mean_k: torch.Tensor | None = None,
    gamma: float = 0.0,
    each_row: bool = False,
    max_blocks: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`_lists` of a grid given by its fields; the last nine arguments are those of the query-aware heads."""
    grid, aware = BlockGrid(len(verticals), q_length, kv_length, q_start, row_starts, padded, block_size), None
    if q is not None and k is not None and heads is not None and mean_k is not None:
        call = AttentionCall(q, k, k, scale, 0, "prefill", q_start, row_starts, softcap)
        aware = QueryAware(heads, call, mean_k, gamma, each_row, max_blocks)
    return _lists(verticals, slashes, aware, grid)


def _lists(
    verticals: torch.Tensor, slashes: torch.Tensor, aware: QueryAware | None, grid: BlockGrid
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks of each query block, int32 `[B, Hq, NQ, N]`, and their number, int32 `[B, Hq, NQ]`."""
    batch, heads, num_blocks = verticals.shape
    queries, (indices, counts) = grid.num_query_blocks, _room(verticals, grid)
    verticals, slashes, row_starts = verticals.contiguous(), slashes.contiguous(), grid.row_starts.contiguous()
    cut = None if aware is None else PooledCut.of(aware, grid)
    of_aware = (counts,) * 4 if cut is None else (cut.heads, cut.order, cut.attention, cut.floors)
    for part in [slice(0, batch * heads)] if cut is None else cut.slices():
        _plan_kernel[((part.stop - part.start) * queries,)](
            verticals,
            slashes,
            *of_aware,  # not read without query-aware heads
            row_starts,
            grid.q_start,
            grid.kv_length,
            indices,
            counts,
            part.start,
            heads,
            queries,
            num_blocks,
            AWARE=cut is not None,
            EACH_ROW=aware is not None and aware.each_row,
            FLOORS=cut.floors.shape[1] if cut is not None and not cut.aware.each_row else 1,
            SIDE=grid.block_size,
            BLOCK=min(1024, triton.next_power_of_2(num_blocks)),
        )
    return indices, counts


@jit(["q_start", "keys", "first", "heads", "queries", "blocks"])
def _plan_kernel(
    verticals, slashes, aware, order, attention, floors, row_starts, q_start, keys, indices, counts, first, heads,
    queries, blocks, AWARE: tl.constexpr, EACH_ROW: tl.constexpr, FLOORS: tl.constexpr, SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the list of one query block."""
    pid = tl.program_id(0)
    i_bh, i_q = first + pid // queries, pid % queries
    if AWARE:
        i_bh = tl.load(order + i_bh).to(tl.int32)
    i_b = i_bh // heads
    first_block, rows = query_blocks_of_row(row_starts, q_start, keys, i_b, SIDE)
    query_block = first_block + i_q
    end = tl.where(i_q < rows, query_block + 1, 0)
    i_list = i_bh.to(tl.int64) * queries + i_q
    chosen_end, floor = 0, 0
    if AWARE:
        if tl.load(aware + i_bh) != 0:
            chosen_end = end
            floor = tl.load(floors + (i_list if EACH_ROW else i_bh * FLOORS + FLOORS - 1))
    count = 0
    for j in tl.range(0, end, BLOCK):
        offs_j = j + tl.arange(0, BLOCK)  # [BLOCK]
        mask = offs_j < end  # [BLOCK]
        taken = tl.load(verticals + i_bh.to(tl.int64) * blocks + offs_j, mask=mask, other=0) != 0  # [BLOCK]
        distance = query_block - offs_j  # [BLOCK]
        taken = taken | (tl.load(slashes + i_bh.to(tl.int64) * blocks + distance, mask=mask, other=0) != 0)  # [BLOCK]
        if AWARE:
            p_a = attention + pid.to(tl.int64) * blocks + offs_j  # [BLOCK]
            b_a = tl.load(p_a, mask=offs_j < chosen_end, other=0.0)  # [BLOCK]
            taken = taken | ((b_a.to(tl.int32, bitcast=True) > floor) & (offs_j < chosen_end))  # [BLOCK]
        taken = (taken & mask).to(tl.int32)  # [BLOCK]
        place = count + tl.cumsum(taken, 0) - 1  # [BLOCK]
        tl.store(indices + i_list * blocks + place, offs_j, mask=taken != 0)
        count += tl.sum(taken, 0)
    tl.store(counts + i_list, count)
