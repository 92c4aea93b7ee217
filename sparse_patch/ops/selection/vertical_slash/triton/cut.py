"""Where query-aware heads cut their pooled attention, the causal attention of mean queries to mean keys.

The attention is held for one slice of the heads at a time, query-aware heads first. These then need as few slices as
possible, and in the other slices every program exits at once. The host does not know the number of query-aware heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import block_of
from sparse_patch.kernels.pieces import LOG2_E, add_to_exp_sum, query_blocks_of_row, softcap_logits
from sparse_patch.kernels.slices import slices
from sparse_patch.ops.selection.vertical_slash.params import QueryAware
from sparse_patch.ops.selection.vertical_slash.triton.search import search, warps_of
from sparse_patch.plans import BlockGrid

_SLICE_BYTES = 56 << 20  # pooled attention that is held at once; measured on an H200
_LONG = 2**17  # entries; among more, one program finds the largest too slowly
_CHUNK = 16384  # such entries per program
_LONG_STEPS = 9  # launches of such a search: four bits each, and one that adds up the last


@dataclass(frozen=True)
class PooledCut:
    """The pooled attention of a slice of the heads, and where it is cut.

    Attributes:
        aware: which heads are cut, and by which rule.
        grid: the grid of their call.
        heads: the heads of `aware`, contiguous.
        row_starts: the row starts of `grid`, contiguous.
        order: every head of every row, the query-aware ones first, int64 `[B * Hq]`.
        attention: float32 `[heads of a slice, NQ, N]`; with `each_row` nothing is written above the diagonal.
        floors: int32 `[B * Hq, n]`; entries whose bits are above the floor are taken. With `each_row` there is one
            floor for each query block; otherwise the last floor counts.
    """

    aware: QueryAware
    grid: BlockGrid
    heads: torch.Tensor
    row_starts: torch.Tensor
    order: torch.Tensor
    attention: torch.Tensor
    floors: torch.Tensor

    @classmethod
    def of(cls, aware: QueryAware, grid: BlockGrid) -> "PooledCut":
        """A cut that holds no results yet."""
        number, queries, num_blocks = aware.heads.numel(), grid.num_query_blocks, grid.num_key_blocks
        floors = queries if aware.each_row else _LONG_STEPS if queries * num_blocks > _LONG else 1
        held = next(_slices(number, grid)).stop
        return cls(
            aware,
            grid,
            heads=aware.heads.contiguous(),
            row_starts=grid.row_starts.contiguous(),
            order=aware.heads.flatten().int().argsort(descending=True, stable=True),
            attention=aware.mean_k.new_empty(held, queries, num_blocks),
            floors=torch.empty(number, floors, dtype=torch.int32, device=aware.heads.device),
        )

    def slices(self) -> Iterator[slice]:
        """Slices of `order`. After each slice, `attention` and `floors` are those of its heads."""
        for part in _slices(len(self.order), self.grid):
            _attend_pooled(self, part)
            _find_floors(self, part)
            yield part


def _slices(heads: int, grid: BlockGrid) -> Iterator[slice]:
    return slices(heads, 4 * grid.num_query_blocks * grid.num_key_blocks, limit=_SLICE_BYTES)


def _attend_pooled(cut: PooledCut, part: slice) -> None:
    """Compute the pooled attention of the query-aware heads of a slice."""
    aware, call, grid, block_i = cut.aware, cut.aware.call, cut.grid, 16
    queries = grid.num_query_blocks
    _pooled_kernel[((part.stop - part.start) * triton.cdiv(queries, block_i),)](
        call.q,
        aware.mean_k.contiguous(),
        cut.heads,
        cut.order,
        cut.attention,
        cut.row_starts,
        *call.q.stride(),
        call.q_start,
        call.kv_length,
        part.start,
        call.q.shape[1],
        call.group_size,
        queries,
        grid.num_key_blocks,
        LOG2_E.value * call.scale,
        LOG2_E.value * (call.softcap or 1.0),
        HAS_SOFTCAP=call.softcap is not None,
        EACH_ROW=aware.each_row,
        D=call.q.shape[3],
        BLOCK_D=block_of(call.q.shape[3]),
        SIDE=grid.block_size,
        BLOCK_I=block_i,
        BLOCK_J=64,
    )


def _find_floors(cut: PooledCut, part: slice) -> None:
    """Find the floors of the query-aware heads of a slice."""
    aware, grid, (queries, num_blocks) = cut.aware, cut.grid, cut.attention.shape[1:]
    if not aware.each_row and queries * num_blocks > _LONG:
        return _find_floors_of_long(cut, part)
    length = num_blocks if aware.each_row else queries * num_blocks
    block = min(4096 if aware.each_row else 16384, triton.next_power_of_2(length))
    floors = cut.floors.shape[1]
    _floor_kernel[((part.stop - part.start) * floors,)](
        cut.attention,
        cut.heads,
        cut.order,
        cut.row_starts,
        grid.q_start,
        grid.kv_length,
        cut.floors,
        part.start,
        aware.heads.shape[1],
        length,
        aware.gamma,
        aware.max_blocks or 0,
        ROWS=floors,
        EACH_ROW=aware.each_row,
        LIMITED=aware.max_blocks is not None,
        SIDE=grid.block_size,
        BLOCK=block,
        num_warps=warps_of(block),
    )


def _find_floors_of_long(cut: PooledCut, part: slice) -> None:
    """Find them with many programs per head, and one launch for each step of the search."""
    aware, grid, number, length = cut.aware, cut.grid, part.stop - part.start, cut.attention[0].numel()
    chunks = triton.cdiv(length, _CHUNK)
    sums = cut.attention.new_empty(2, number, chunks, 16)
    for step in range(_LONG_STEPS):
        _digit_kernel[(number * chunks,)](
            cut.attention,
            cut.heads,
            cut.order,
            cut.row_starts,
            grid.q_start,
            grid.kv_length,
            sums[step % 2],
            sums[1 - step % 2],
            cut.floors,
            part.start,
            aware.heads.shape[1],
            length,
            chunks,
            aware.gamma,
            step,
            SIDE=grid.block_size,
            CHUNK=_CHUNK,
            CHUNKS=triton.next_power_of_2(chunks),
            num_warps=8,
        )


@jit(["q_start", "keys", "first", "heads", "queries", "blocks"])
def _pooled_kernel(
    q, mean_k, aware, order, attention, row_starts, stride_qb, stride_qh, stride_qs, stride_qd, q_start, keys, first,
    heads, group, queries, blocks, scale, softcap, HAS_SOFTCAP: tl.constexpr, EACH_ROW: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SIDE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Causal attention of mean queries to mean keys, for some query blocks of a query-aware head.

    `scale` and `softcap` convert logits to log2 units.
    """
    # 1. The tile: query blocks of a head.
    tiles = tl.cdiv(queries, BLOCK_I)
    pid = tl.program_id(0)
    i_bh = tl.load(order + first + pid // tiles).to(tl.int32)
    if tl.load(aware + i_bh) == 0:
        return
    i_b, i_h = i_bh // heads, i_bh % heads
    offs_i = (pid % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)  # [BI]
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    first_block, rows = query_blocks_of_row(row_starts, q_start, keys, i_b, SIDE)
    real = offs_i < rows  # [BI]
    query_block = first_block + offs_i  # [BI]
    start = tl.load(row_starts + i_b).to(tl.int32)
    low = tl.maximum(q_start - start, 0)

    # 2. Mean queries.
    # [1, BD]
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh + offs_d.to(tl.int64)[None, :] * stride_qd
    b_q = tl.zeros([BLOCK_I, BLOCK_D], dtype=tl.float32)  # [BI, BD]
    for i in tl.range(0, SIDE, 8):
        for more in tl.static_range(8):  # eight loads at a time: single loads would each wait
            position = query_block * SIDE + i + more  # [BI]
            there = real & (position >= low) & (position < keys - start)  # [BI]
            rows_q = (position + start - q_start).to(tl.int64)  # [BI]
            # [BI, BD]
            b_q += tl.load(p_q + rows_q[:, None] * stride_qs, mask=there[:, None] & (offs_d < D)[None, :], other=0.0)
    number = tl.minimum(query_block * SIDE + SIDE, keys - start) - tl.maximum(query_block * SIDE, low)  # [BI]
    b_q *= (scale / tl.maximum(number, 1))[:, None]  # [BI, BD]

    # 3. Logits, and their LSE.
    p_k = mean_k + (i_b * (heads // group) + i_h // group).to(tl.int64) * blocks * D
    p_o = attention + ((pid // tiles).to(tl.int64) * queries + offs_i[:, None]) * blocks  # [BI, 1]
    m_i = tl.full([BLOCK_I], -float("inf"), dtype=tl.float32)  # [BI]
    l_i = tl.zeros([BLOCK_I], dtype=tl.float32)  # [BI]
    end = tl.minimum(first_block + (pid % tiles) * BLOCK_I + BLOCK_I, blocks)  # key blocks that the tile sees
    for j in tl.range(0, end, BLOCK_J):
        offs_j = j + tl.arange(0, BLOCK_J)  # [BJ]
        # [BD, BJ]
        b_k = tl.load(
            p_k + offs_j[None, :] * D + offs_d[:, None],
            mask=(offs_j < end)[None, :] & (offs_d < D)[:, None],
            other=0.0,
        )
        s = tl.dot(b_q, b_k, input_precision="tf32x3")  # [BI, BJ]
        if HAS_SOFTCAP:
            s = softcap_logits(s, 1.0, softcap)  # [BI, BJ]
        seen = (offs_j[None, :] <= query_block[:, None]) & real[:, None] & (offs_j < end)[None, :]  # [BI, BJ]
        s = tl.where(seen, s, -float("inf"))  # [BI, BJ]
        tl.store(p_o + offs_j[None, :], s, mask=(offs_i < queries)[:, None] & (offs_j < end)[None, :])
        m_i, l_i = add_to_exp_sum(m_i, l_i, s)  # [BI], [BI]

    # 4. Weights, from the logits and the LSE.
    tl.debug_barrier()  # the logits that other threads of this program wrote are read below
    lse = tl.where(l_i > 0, m_i + tl.math.log2(l_i), 0.0)  # [BI]
    for j in tl.range(0, end if EACH_ROW else blocks, BLOCK_J):
        offs_j = j + tl.arange(0, BLOCK_J)  # [BJ]
        mask = (offs_i < queries)[:, None] & (offs_j < blocks)[None, :]  # [BI, BJ]
        s = tl.load(p_o + offs_j[None, :], mask=mask & (offs_j < end)[None, :], other=-float("inf"))  # [BI, BJ]
        tl.store(p_o + offs_j[None, :], tl.math.exp2(s - lse[:, None]), mask=mask)


@jit(["q_start", "keys", "first", "heads", "n", "most"])
def _floor_kernel(
    attention, aware, order, row_starts, q_start, keys, floors, first, heads, n, gamma, most,
    ROWS: tl.constexpr, EACH_ROW: tl.constexpr, LIMITED: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_bh = tl.load(order + first + pid // ROWS).to(tl.int32)
    if tl.load(aware + i_bh) == 0:
        return
    first_block, rows = query_blocks_of_row(row_starts, q_start, keys, i_bh // heads, SIDE)
    if EACH_ROW:
        end = tl.where(pid % ROWS < rows, first_block + pid % ROWS + 1, 0)  # key blocks that the query block sees
        floor = search(attention + pid.to(tl.int64) * n, end, gamma, most, True, LIMITED, BLOCK) - 1
    else:
        limit = gamma * rows.to(tl.float32)
        floor = search(attention + pid.to(tl.int64) * n, n, limit, most, False, False, BLOCK)
    tl.store(floors + i_bh * ROWS + pid % ROWS, floor)


@jit(["q_start", "keys", "first", "heads", "n", "chunks", "step"])
def _digit_kernel(
    attention, aware, order, row_starts, q_start, keys, sums, sums_before, floors, first, heads, n, chunks, gamma, step,
    SIDE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One step of the search for a head's floor: four more bits from the sums of the step before, then new sums.

    Every program of a head adds the same sums in the same order, so all programs find the same bits.
    """
    pid = tl.program_id(0)
    i_row, i_chunk = pid // chunks, pid % chunks
    i_bh = tl.load(order + first + i_row).to(tl.int32)
    if tl.load(aware + i_bh) == 0:
        return
    offs_n = tl.arange(0, 16)  # [16]
    floor = tl.load(floors + i_bh * 9 + tl.maximum(step - 1, 0)) if step > 0 else 0
    if step > 0:
        offs_c = tl.arange(0, CHUNKS)  # [CHUNKS]
        p_before = sums_before + (i_row * chunks + offs_c[:, None]) * 16 + offs_n[None, :]  # [CHUNKS, 16]
        mass = tl.sum(tl.load(p_before, mask=(offs_c < chunks)[:, None], other=0.0), 0)  # [16]
        _, rows = query_blocks_of_row(row_starts, q_start, keys, i_bh // heads, SIDE)
        limit = gamma * rows.to(tl.float32)
        digits = tl.sum(((mass > limit) & (offs_n > 0)).to(tl.int32), 0)
        floor += digits << (32 - 4 * step)
    if i_chunk == 0:
        tl.store(floors + i_bh * 9 + step, floor)
    if step < 8:
        candidates = floor + (offs_n << (28 - 4 * step))  # [16]
        mass = tl.zeros([16], dtype=tl.float32)  # [16]
        for i in tl.range(i_chunk * CHUNK, tl.minimum((i_chunk + 1) * CHUNK, n), 1024):
            offs = i + tl.arange(0, 1024)  # [1024]
            x = tl.load(attention + i_row.to(tl.int64) * n + offs, mask=offs < n, other=0.0)  # [1024]
            bits = x.to(tl.int32, bitcast=True)  # [1024]
            mass += tl.sum(tl.where(bits[:, None] >= candidates[None, :], x[:, None], 0.0), 0)  # [16]
        mass = tl.where((step == 0) & (offs_n > 3), 0.0, mass)  # [16]; beyond the bits of 2.0
        tl.store(sums + (i_row * chunks + i_chunk) * 16 + offs_n, mass)
