"""Triton kernel: reads the sink and window of a tile of queries, and no tile outside them.

A program holds one tile of queries of one head. Its keys are two runs: the sink, and the window. The second run begins
at the window of the tile's first query, or at the end of the sink, and ends at the last query. One loop reads, without
a mask, the tiles of both runs that every query sees whole. A second loop reads the tiles at the edges of the runs.
Programs with the most work come first: KV heads by decreasing span, within each the query tiles from the last to the
first, and the query heads of the GQA group side by side, because they share keys in the cache. Keys and values are
loaded through tensor descriptors, as in
`ops.attention.block_sparse`.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

import torch
import triton
import triton.language as tl

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import (
    attention_constants,
    attention_outputs,
    by_row,
    given,
    gpu_properties,
    launch_op,
    tile_of,
    tma_ready,
)
from sparse_patch.kernels.pieces import LN2, LOG2_E, LOWEST, add_tile, tile_logits, tiles_of, window_at
from sparse_patch.ops.attention.op import Attended
from sparse_patch.plans import SpanPlan, Window, window_parameters

EVERY = 1 << 30  # the window of every key
_BLOCK = 128  # block size that tiles are chosen for


def attend(call: AttentionCall, plan: SpanPlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.span.attend`."""
    return Attended(*_launched(call, plan, in_float32=False))


def attend_in_float32(call: AttentionCall, plan: SpanPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` with an output in float32, for callers that continue from it."""
    return _launched(call, plan, in_float32=True)


def _launched(call: AttentionCall, plan: SpanPlan, in_float32: bool) -> tuple[torch.Tensor, torch.Tensor]:
    sinks, windows = zip(*plan.spans, strict=True)
    return span_attention(
        call.q,
        call.k,
        call.v,
        call.kv_start,
        call.kv_end,
        sinks,
        flat(windows),
        call.scale,
        call.softcap or 0.0,
        in_float32,
    )


def flat(windows: Sequence[Window]) -> list[int]:
    """The `window_parameters` of all windows in one flat list, because a custom op takes no list of tuples."""
    numbers = [window_parameters(window) for window in windows]
    return list(
        chain.from_iterable((min(most, EVERY), base, slope, min(least, EVERY)) for most, base, slope, least in numbers)
    )


def by_head(numbers: Sequence[int]) -> list[tuple[int, ...]]:
    """The inverse of `flat`: the four numbers of each window."""
    return [tuple(numbers[at : at + 4]) for at in range(0, len(numbers), 4)]


def grows(numbers: Sequence[int]) -> bool:
    """Whether any of the windows, as `flat` gives them, is not constant."""
    return any(most != least for most, _, _, least in by_head(numbers))


def _outputs(q: torch.Tensor, v: torch.Tensor, in_float32: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_outputs(q, v, return_lse=True, dtype=torch.float32 if in_float32 else q.dtype)


@launch_op("span_attention", _outputs)
def span_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    sinks: Sequence[int],
    windows: Sequence[int],
    scale: float,
    softcap: float,
    in_float32: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's launch; arguments as in `AttentionCall` and `SpanPlan`, windows as from `flat`, softcap 0 for none.

    Returns:
        The output `[B, Hq, Sq, Dv]`, in memory as `[B, Sq, Hq, Dv]`, and the LSE `[B, Hq, Sq]`.
    """
    out, lse = _outputs(q, v, in_float32)
    batch, heads, q_length, head_dim = q.shape
    kv_heads, capacity = k.shape[1:3]
    k, v = tma_ready(k), tma_ready(v)
    tile = tile_of(max(head_dim, v.shape[3]), q.dtype, _BLOCK, gpu_properties(q.device)[1])
    _span_kernel[(batch * heads * triton.cdiv(q_length, tile.block_m),)](
        q,
        tiles_of(k, tile.block_n),
        tiles_of(v, tile.block_n),
        out,
        lse,
        _longest_first(tuple(sinks), tuple(windows), q.device),
        by_row(kv_start, lse),
        given(kv_end, lse),
        q.stride(),
        out.stride()[:3],
        batch,
        heads,
        kv_heads,
        q_length,
        capacity,
        scale,
        softcap,
        **attention_constants(q.shape[-1], v.shape[-1], q.dtype, softcap > 0),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        HAS_START=kv_start is not None,
        HAS_END=kv_end is not None,
        GROWS=grows(windows),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, lse


@lru_cache(maxsize=1024)
def _longest_first(sinks: tuple[int, ...], windows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """KV heads by decreasing span, with sink and window of each, int64 `[Hkv, 6]`.

    Cached, because copying numbers to a GPU makes the host wait for the GPU.
    """
    heads = enumerate(zip(sinks, by_head(windows), strict=True))
    spans = [(head, min(sink, EVERY), *window) for head, (sink, window) in heads]
    return torch.tensor(sorted(spans, key=lambda span: -span[1] - span[2]), dtype=torch.int64, device=device)


@jit(["q_length", "capacity"])
def _span_kernel(
    q,
    k_desc,
    v_desc,
    o,
    lse,
    spans,
    kv_start,
    kv_end,
    q_strides,
    o_strides,
    batch,
    heads,
    kv_heads,
    q_length,
    capacity,
    scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_END: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    stride_qb, stride_qh, stride_qs, stride_qd = q_strides
    stride_ob, stride_oh, stride_os = o_strides
    # 1. The tile: queries of a head, and the span of its KV head.
    group = heads // kv_heads
    tiles = tl.cdiv(q_length, BLOCK_M)
    pid = tl.program_id(0)
    i_g = pid % group
    pid = pid // group
    i_m = tiles - 1 - pid % tiles
    pid = pid // tiles
    i_b = pid % batch
    p_span = spans + pid // batch * 6
    i_hk = tl.load(p_span).to(tl.int32)
    sink = tl.load(p_span + 1).to(tl.int32)
    window = tl.load(p_span + 2).to(tl.int32)
    i_h = i_hk * group + i_g

    # 2. The runs of keys: what every query of the tile sees, and their edges.
    # From here on, everything counts in slots of the buffer; the row's first key lies in slot `start`.
    start = 0
    if HAS_START:
        start = tl.load(kv_start + i_b).to(tl.int32)
    end = capacity
    if HAS_END:
        end = tl.load(kv_end).to(tl.int32)
    offs_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    mask_m = offs_m < q_length  # [BM]
    slot_m = end - q_length + offs_m  # [BM]
    q_first = end - q_length + i_m * BLOCK_M
    q_last = end - q_length + tl.minimum(i_m * BLOCK_M + BLOCK_M, q_length) - 1
    low = tl.maximum(start, 0)
    sink_stop = tl.minimum(tl.maximum(start + sink, low), q_last + 1)
    window_first, window_last, window_m = window, window, window  # of the first and the last query, and of each
    if GROWS:
        window_first = window_at(p_span + 2, q_first - start)
        window_last = window_at(p_span + 2, q_last - start)
        window_m = window_at(p_span + 2, slot_m - start)[:, None]  # [BM, 1]
    window_begin = tl.minimum(tl.maximum(q_first - window_first + 1, sink_stop), q_last + 1)
    # Of both runs, the part that every query of the tile sees.
    sink_tiles = tl.maximum(tl.minimum(sink_stop, q_first + 1) - low, 0) // BLOCK_N
    inner_begin = tl.minimum(tl.maximum(q_last - window_last + 1, window_begin), q_last + 1)
    inner_tiles = tl.maximum(q_first + 1 - inner_begin, 0) // BLOCK_N
    # What remains: the end of the sink, and both ends of the window.
    sink_rest = low + sink_tiles * BLOCK_N
    window_rest = inner_begin + inner_tiles * BLOCK_N
    edges_a = tl.cdiv(tl.maximum(sink_stop - sink_rest, 0), BLOCK_N)
    edges_ab = edges_a + tl.cdiv(inner_begin - window_begin, BLOCK_N)
    edges_abc = edges_ab + tl.cdiv(q_last + 1 - window_rest, BLOCK_N)

    # 3. Queries.
    offs_n = tl.arange(0, BLOCK_N)  # [BN]
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    offs_dv = tl.arange(0, BLOCK_DV)  # [BDV]
    rows = offs_m.to(tl.int64)  # [BM]
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh + rows[:, None] * stride_qs  # [BM, 1]
    p_q = p_q + offs_d.to(tl.int64)[None, :] * stride_qd  # [BM, BD]
    b_q = tl.load(p_q, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)  # [BM, BD]

    # 4. Tiles of both runs that every query sees whole, without a mask.
    to_log2 = LOG2_E * (1.0 if HAS_SOFTCAP else scale)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)  # [BM, BDV]
    m_i = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)  # [BM]; finite: a tile may hold no key of a query
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)  # [BM]

    for t in tl.range(0, sink_tiles + inner_tiles):
        slot = tl.where(t < sink_tiles, low + t * BLOCK_N, inner_begin + (t - sink_tiles) * BLOCK_N)
        b_k = k_desc.load([i_b, i_hk, slot, 0]).reshape(BLOCK_N, BLOCK_D)  # [BN, BD]
        s = tile_logits(b_q, b_k.T, softcap, HAS_SOFTCAP, scale, PRECISION)  # [BM, BN]
        b_v = v_desc.load([i_b, i_hk, slot, 0]).reshape(BLOCK_N, BLOCK_DV)  # [BN, BDV]
        acc, m_i, l_i = add_tile(s, b_v, acc, m_i, l_i, to_log2, PRECISION)  # [BM, BDV], [BM], [BM]

    # 5. The edges, with a mask.
    for t in tl.range(0, edges_abc):
        slot = tl.where(t < edges_ab, window_begin + (t - edges_a) * BLOCK_N, window_rest + (t - edges_ab) * BLOCK_N)
        slot = tl.where(t < edges_a, sink_rest + t * BLOCK_N, slot)
        stop = tl.where(t < edges_a, sink_stop, tl.where(t < edges_ab, inner_begin, q_last + 1))
        b_k = k_desc.load([i_b, i_hk, slot, 0]).reshape(BLOCK_N, BLOCK_D)  # [BN, BD]
        s = tile_logits(b_q, b_k.T, softcap, HAS_SOFTCAP, scale, PRECISION)  # [BM, BN]
        slot_n = slot + offs_n  # [BN]
        distance = slot_m[:, None] - slot_n[None, :]  # [BM, BN]
        # [BM, BN]
        seen = (distance >= 0) & ((distance < window_m) | (slot_n < sink_stop)[None, :]) & (slot_n < stop)[None, :]
        s = tl.where(seen, s, -float("inf"))  # [BM, BN]
        b_v = v_desc.load([i_b, i_hk, slot, 0]).reshape(BLOCK_N, BLOCK_DV)  # [BN, BDV]
        if HAS_END:  # after the end there may be anything: 0 * NaN is NaN
            b_v = tl.where((slot_n < stop)[:, None], b_v, 0.0)  # [BN, BDV]
        acc, m_i, l_i = add_tile(s, b_v, acc, m_i, l_i, to_log2, PRECISION)  # [BM, BDV], [BM], [BM]

    # 6. Output and LSE.
    real = (slot_m >= start) & (l_i > 0)  # [BM]; padding queries see no key, whatever the tile's other queries see
    acc = tl.where(real[:, None], acc / tl.where(real, l_i, 1.0)[:, None], 0.0)  # [BM, BDV]
    b_lse = tl.where(real, (m_i + tl.math.log2(tl.where(real, l_i, 1.0))) * LN2, -float("inf"))  # [BM]
    # [BM, BDV]
    p_o = o + i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh + rows[:, None] * stride_os + offs_dv[None, :]
    tl.store(p_o, acc.to(o.dtype.element_ty), mask=mask_m[:, None] & (offs_dv < DV)[None, :])
    tl.store(lse + (i_b * heads + i_h).to(tl.int64) * q_length + rows, b_lse, mask=mask_m)
