"""Triton kernels: attention to the slots of a ring, and writing them.

An attention program holds the queries of a GQA group and reads a piece of one head's slots. The host lists the pieces
once for a layout, so heads of very different capacity keep the whole GPU busy. Slots that are not filled yet cost
nothing. For one token the pieces are short, and a second kernel merges their results. For several tokens a piece is a
whole head; the programs continue from the output and LSE of the forward's attention to its own keys. A captured CUDA
graph serves every length, because the number of tokens that a row has seen is read on the device.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import attention_outputs, given, launch_op, rows_in_one_piece
from sparse_patch.kernels.pieces import LN2, LOG2_E, add_split_tile, merge_splits, softcap_logits, window_at
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.attention.span.triton import attend_in_float32, flat
from sparse_patch.ops.attention.span_ring.launches import heads_of, launch_of, piece_of, pieces_of
from sparse_patch.ops.attention.span_ring.ring import Ring, RingLayout, own_keys


def prepare(layout: RingLayout, device: torch.device) -> None:
    """See `ops.attention.span_ring.prepare`; for single tokens."""
    sinks, windows = zip(*layout.spans, strict=True)
    heads_of(sinks, layout.capacities, device)
    pieces_of(sinks, tuple(flat(windows)), layout.capacities, piece_of(layout.capacities), device)


def attend(call: AttentionCall, ring: Ring, before: torch.Tensor) -> Attended:
    """See `ops.attention.span_ring.attend`."""
    layout = ring.layout
    own, own_lse = (None, None) if call.q.shape[2] == 1 else attend_in_float32(*own_keys(call, layout, before))
    sinks, windows = zip(*layout.spans, strict=True)
    out, lse = span_ring_attention(
        call.q,
        ring.k,
        ring.v,
        before,
        own,
        own_lse,
        sinks,
        flat(windows),
        layout.capacities,
        call.scale,
        call.softcap or 0.0,
    )
    return Attended(out, lse)


def write(ring: Ring, k: torch.Tensor, v: torch.Tensor, before: torch.Tensor) -> None:
    """See `ops.attention.span_ring.write`."""
    sinks = [sink for sink, _ in ring.layout.spans]
    span_ring_write(ring.k, ring.v, k, v, before, sinks, ring.layout.capacities)


def _outputs(q: torch.Tensor, ring_v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_outputs(q, ring_v, return_lse=True)


@launch_op("span_ring_attention", _outputs)
def span_ring_attention(
    q: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    before: torch.Tensor,
    own: torch.Tensor | None,
    own_lse: torch.Tensor | None,
    sinks: Sequence[int],
    windows: Sequence[int],
    capacities: Sequence[int],
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels' launch; arguments as in `attention.span_ring` and `attention.span.triton`, softcap 0 for none.

    Args:
        own: float32 `[B, Hq, Sq, Dv]`, the queries' attention to keys that are not in the ring; None if the ring has
            all keys, including the queries' own.
        own_lse: its LSE, float32 `[B, Hq, Sq]`, contiguous.

    Returns:
        The output `[B, Hq, Sq, Dv]`, in memory as `[B, Sq, Hq, Dv]`, and the LSE `[B, Hq, Sq]`.
    """
    out, lse = _outputs(q, ring_v)
    batch, heads, q_length, head_dim = q.shape
    value_dim, keys = ring_v.shape[2], (tuple(sinks), tuple(windows), tuple(capacities))
    sizes, flags = (batch, heads, q_length, head_dim, value_dim), (softcap > 0, own is not None)
    grid, splits, piece, work, constants = launch_of(sizes, keys, flags, q.dtype, q.device)
    own, own_lse = given(own, out), given(own_lse, lse)
    part, part_lse = out, lse
    if splits > 1:
        part = q.new_empty((batch, heads, q_length, splits, value_dim), dtype=torch.float32)
        part_lse = q.new_full((batch, heads, q_length, splits), -torch.inf, dtype=torch.float32)
    _ring_kernel[grid](
        q,
        ring_k,
        ring_v,
        part,
        part_lse,
        own,
        own_lse,
        before.contiguous(),
        work,
        q.stride(),
        ring_k.stride(),
        ring_v.stride(),
        part.stride()[:3],
        own.stride()[:3],
        heads,
        batch,
        q_length,
        splits,
        piece,
        scale,
        softcap,
        **constants,
    )
    if splits > 1:
        merge_splits(part, part_lse, out, lse)
    return out, lse


@launch_op("span_ring_write", mutates_args=("ring_k", "ring_v"))
def span_ring_write(
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    before: torch.Tensor,
    sinks: Sequence[int],
    capacities: Sequence[int],
) -> None:
    """The kernel's launch; arguments as in `ops.attention.span_ring`."""
    batch, kv_heads, length, head_dim = k.shape
    value_dim = v.shape[3]
    k, v = rows_in_one_piece(k), rows_in_one_piece(v)
    block_s = 1 if length == 1 else 64
    _write_kernel[(triton.cdiv(length, block_s), kv_heads, batch)](
        k,
        v,
        ring_k,
        ring_v,
        before.contiguous(),
        heads_of(tuple(sinks), tuple(capacities), k.device),
        k.stride()[:3],
        v.stride()[:3],
        ring_k.stride(),
        ring_v.stride(),
        length,
        D=head_dim,
        DV=value_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_DV=triton.next_power_of_2(value_dim),
        BLOCK_S=block_s,
        num_warps=4,
    )


@jit(["batch", "q_length", "splits", "piece"])
def _ring_kernel(
    q,
    k,
    v,
    o,
    lse,
    own,
    own_lse,
    before,
    work,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    own_strides,
    heads,
    batch,
    q_length,
    splits,
    piece,
    scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_OWN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    stride_qb, stride_qh, stride_qs, stride_qd = q_strides
    stride_kb, stride_ks, stride_kd = k_strides
    stride_vb, stride_vs, stride_vd = v_strides
    stride_ob, stride_oh, stride_os = o_strides
    stride_wb, stride_wh, stride_ws = own_strides
    # 1. The tile: queries of a group, and a piece of its slots.
    blocks = tl.cdiv(q_length * GROUP, BLOCK_M)
    pid = tl.program_id(0)
    i_m = pid % blocks  # side by side: these programs read the same keys
    pid = pid // blocks
    i_b = (pid % batch).to(tl.int64)
    p_work = work + pid // batch * 9
    i_split = tl.load(p_work).to(tl.int32)
    i_hk = tl.load(p_work + 1).to(tl.int32)
    sink = tl.load(p_work + 2).to(tl.int32)
    capacity = tl.load(p_work + 3).to(tl.int32)
    first_slot = tl.load(p_work + 4)
    window = tl.load(p_work + 5).to(tl.int32)
    turn = capacity - sink

    # 2. The slots that are filled.
    seen = tl.load(before + i_b).to(tl.int32)  # tokens that the row had before the first query
    held = seen
    if not HAS_OWN:
        held = seen + 1  # the token of the only query is there
    begin = i_split * piece
    end = tl.minimum(begin + piece, tl.minimum(capacity, held))
    if HAS_OWN:
        past_window = i_m * BLOCK_M // GROUP + 1 >= window  # of the first query of the tile, so of all
        end = tl.where(past_window, tl.minimum(end, sink), end)

    # 3. Queries.
    # Rows of a tile: the queries one after the other, each with the heads of the group.
    offs_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    offs_q = offs_m // GROUP  # [BM]
    offs_h = i_hk * GROUP + offs_m % GROUP  # [BM]
    mask_m = offs_q < q_length  # [BM]
    offs_n = tl.arange(0, BLOCK_N)  # [BN]
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    offs_dv = tl.arange(0, BLOCK_DV)  # [BDV]
    p_q = q + i_b * stride_qb + offs_h.to(tl.int64) * stride_qh + offs_q.to(tl.int64) * stride_qs  # [BM]
    mask_q = mask_m[:, None] & (offs_d < D)[None, :]  # [BM, BD]
    b_q = tl.load(p_q[:, None] + (offs_d.to(tl.int64) * stride_qd)[None, :], mask=mask_q, other=0.0)  # [BM, BD]
    p_k = k + i_b * stride_kb + first_slot * stride_ks + offs_d.to(tl.int64) * stride_kd  # [BD]
    p_v = v + i_b * stride_vb + first_slot * stride_vs + offs_dv.to(tl.int64) * stride_vd  # [BDV]
    mask_o = mask_m[:, None] & (offs_dv < DV)[None, :]  # [BM, BDV]
    p_lse = (i_b * heads + offs_h) * q_length + offs_q  # [BM]

    # 4. Attention to the slots; it continues from the attention to the own keys.
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)  # [BM, BDV]
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)  # [BM]
    l_i = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)  # [BM, BN]
    if HAS_OWN:
        p_own = own + i_b * stride_wb + offs_h.to(tl.int64) * stride_wh + offs_q.to(tl.int64) * stride_ws  # [BM]
        acc = tl.load(p_own[:, None] + offs_dv[None, :], mask=mask_o, other=0.0)  # [BM, BDV]
        m_i = tl.load(own_lse + p_lse, mask=mask_m, other=-float("inf")) * LOG2_E  # [BM]
        l_i = tl.where((m_i > -float("inf"))[:, None] & (offs_n == 0)[None, :], 1.0, 0.0)  # [BM, BN]

    for n in tl.range(begin, end, BLOCK_N):
        slot = n + offs_n  # [BN]
        readable = slot < end  # [BN]
        rows = slot.to(tl.int64)  # [BN]
        mask_k = readable[:, None] & (offs_d < D)[None, :]  # [BN, BD]
        mask_v = readable[:, None] & (offs_dv < DV)[None, :]  # [BN, BDV]
        b_k = tl.load(p_k[None, :] + (rows * stride_ks)[:, None], mask=mask_k, other=0.0)  # [BN, BD]
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale  # [BM, BN]
        if HAS_SOFTCAP:
            s = softcap_logits(s, 1.0, softcap)  # [BM, BN]
        visible = readable[None, :]  # [1, BN]
        if HAS_OWN or GROWS:
            position = tl.where(slot < sink, slot, slot + (held - 1 - slot) // turn * turn)  # [BN]
            distance = (seen + offs_q)[:, None] - position[None, :]  # [BM, BN]
            window_m = window
            if GROWS:
                window_m = window_at(p_work + 5, seen + offs_q)[:, None]  # [BM, 1]
            visible = visible & ((slot < sink)[None, :] | (distance < window_m))  # [BM, BN]
        s = tl.where(visible, s * LOG2_E, -float("inf"))  # [BM, BN]
        b_v = tl.load(p_v[None, :] + (rows * stride_vs)[:, None], mask=mask_v, other=0.0)  # [BN, BDV]
        acc, m_i, l_i = add_split_tile(s, b_v, acc, m_i, l_i, PRECISION)  # [BM, BDV], [BM], [BM, BN]

    # 5. Output and LSE, of the piece or of all slots.
    total = tl.sum(l_i, 1)  # [BM]
    divisor = tl.where(total > 0, total, 1.0)  # [BM]; without a key the output is 0 and the LSE, like m_i, is -inf
    acc = acc / divisor[:, None]  # [BM, BDV]
    b_lse = (m_i + tl.math.log2(divisor)) * LN2  # [BM]
    p_o = o + i_b * stride_ob + offs_h.to(tl.int64) * stride_oh + offs_q.to(tl.int64) * stride_os  # [BM]
    if SPLIT:
        p_o += i_split * DV
        p_lse = p_lse * splits + i_split  # [BM]
        mask_o = mask_o & (total > 0)[:, None]  # [BM, BDV]; the merge skips queries without a key
    tl.store(lse + p_lse, b_lse, mask=mask_m)
    tl.store(p_o[:, None] + offs_dv[None, :], acc.to(o.dtype.element_ty), mask=mask_o)


@jit(["length"])
def _write_kernel(
    k,
    v,
    ring_k,
    ring_v,
    before,
    numbers,
    k_strides,
    v_strides,
    ring_k_strides,
    ring_v_strides,
    length,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    stride_kb, stride_kh, stride_ks = k_strides
    stride_vb, stride_vh, stride_vs = v_strides
    stride_rkb, stride_rks, stride_rkd = ring_k_strides
    stride_rvb, stride_rvs, stride_rvd = ring_v_strides
    i_s = tl.program_id(0)
    i_hk = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    sink = tl.load(numbers + i_hk * 3)
    capacity = tl.load(numbers + i_hk * 3 + 1)
    first_slot = tl.load(numbers + i_hk * 3 + 2)
    turn = capacity - sink
    seen = tl.load(before + i_b).to(tl.int32)

    offs_s = i_s * BLOCK_S + tl.arange(0, BLOCK_S)  # [BS]
    position = seen + offs_s  # [BS]
    # Of tokens that would share a slot, only the last one is written.
    kept = (offs_s < length) & (position >= 0) & ((position < sink) | (offs_s >= length - turn))  # [BS]
    slot = tl.where(position < sink, position, sink + (position - sink) % turn)  # [BS]
    slots = (first_slot + slot).to(tl.int64)  # [BS]
    rows = offs_s.to(tl.int64)  # [BS]
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    offs_dv = tl.arange(0, BLOCK_DV)  # [BDV]
    mask_k = kept[:, None] & (offs_d < D)[None, :]  # [BS, BD]
    mask_v = kept[:, None] & (offs_dv < DV)[None, :]  # [BS, BDV]
    p_k = k + i_b * stride_kb + i_hk.to(tl.int64) * stride_kh + rows[:, None] * stride_ks + offs_d[None, :]  # [BS, BD]
    # [BS, BDV]
    p_v = v + i_b * stride_vb + i_hk.to(tl.int64) * stride_vh + rows[:, None] * stride_vs + offs_dv[None, :]
    b_k = tl.load(p_k, mask=mask_k, other=0.0)  # [BS, BD]
    b_v = tl.load(p_v, mask=mask_v, other=0.0)  # [BS, BDV]
    # [BS, BD]
    p_k = ring_k + i_b * stride_rkb + slots[:, None] * stride_rks + offs_d.to(tl.int64)[None, :] * stride_rkd
    # [BS, BDV]
    p_v = ring_v + i_b * stride_rvb + slots[:, None] * stride_rvs + offs_dv.to(tl.int64)[None, :] * stride_rvd
    tl.store(p_k, b_k, mask=mask_k)
    tl.store(p_v, b_v, mask=mask_v)
