"""Triton kernels: split-KV flash decoding.

A program holds the queries of one GQA group (of one query head where each head has a list of its own) and reads a split
of the group's keys; all splits of a row are equally long, whatever the row's length. Keys and values are gathered by
their rows, so pages of any size cost the same loop; the list is read one tile ahead, and not at all for every page. A
second kernel merges the splits by their LSE. The number of splits follows from sizes that the host knows, so a
captured CUDA graph serves every length of its buffers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_patch.call import AttentionCall
from sparse_patch.ops.kernels import (
    add_split_tile,
    by_row,
    gpu,
    launch_op,
    merge_splits,
    rows_in_one_piece,
    softcap_logits,
)
from sparse_patch.plans import PagePlan


@dataclass(frozen=True)
class Tile:
    """How the kernel is cut: keys of a tile, warps of a program, depth of its pipeline, programs for each SM."""

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def tile_of(head_dim: int, itemsize: int, capability: tuple[int, int]) -> Tile:
    """The tile for a head size, bytes of an element and GPU generation; static, so that no length waits for a search.

    A tile of keys and values takes 32 KB: the programs of an SM then keep enough bytes in flight, and three fit.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_n = max(16, min(128, 32768 // (2 * block_d * itemsize)))
    warps = 8 if itemsize == 4 else 4  # float32 is multiplied without tensor cores, in many registers
    return Tile(block_n, warps, 3 if capability in ((8, 0), (9, 0), (10, 0)) else 2, 2)


def attend(call: AttentionCall, plan: PagePlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See `ops.page_decode.attend`."""
    out, lse, logits = page_decode_attention(
        call.q,
        call.k,
        call.v,
        plan.pages,
        plan.counts,
        call.kv_start,
        call.kv_end,
        call.scale,
        call.softcap or 0.0,
        plan.page_size,
        plan.wants_logits,
    )
    return out, lse, logits if plan.wants_logits else None


@launch_op("page_decode_attention")
def page_decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor | None,
    counts: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    scale: float,
    softcap: float,
    page_size: int,
    wants_logits: bool,
    splits: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kernels' launch; arguments as in `AttentionCall` and `PagePlan`, softcap 0 for none.

    Args:
        splits: parts that the keys of a row are cut into; 0 for what fills the GPU.

    Returns:
        The output `[B, Hq, Sq, Dv]`, in memory as `[B, Sq, Hq, Dv]`; the LSE `[B, Hq, Sq]`; the logits
        `[B, Hq, capacity]`, empty if not asked for.
    """
    out, lse, logits = _outputs(q, k, v, wants_logits)
    batch, heads, q_length, head_dim = q.shape
    kv_heads, capacity, value_dim = k.shape[1], k.shape[2], v.shape[3]
    k, v = rows_in_one_piece(k), rows_in_one_piece(v)
    every = pages is None or counts is None
    if pages is None or counts is None:
        pages = counts = lse  # any tensor; it is not read
        groups, tokens, list_strides = kv_heads, capacity, (0, 0, 0, 0)
    else:
        pages = rows_in_one_piece(pages)
        lists, tokens = pages.shape[1], pages.shape[2] * page_size
        groups = max(kv_heads, lists)  # of query heads that read the same
        step = int(lists > 1)
        list_strides = (pages.stride(0), step * pages.stride(1), counts.stride(0), step * counts.stride(1))
    group = heads // groups
    rows = group * q_length
    block_m = 16 if q.dtype == torch.float32 else max(16, min(64, triton.next_power_of_2(rows)))
    programs = batch * groups * triton.cdiv(rows, block_m)
    sms, capability = gpu(q.device)
    tile = tile_of(max(head_dim, value_dim), q.element_size(), capability)
    splits = splits or max(1, min(triton.cdiv(tokens, tile.block_n), tile.programs_per_sm * sms // programs))
    tiles = triton.cdiv(tokens, splits * tile.block_n)  # of a split; a deeper pipeline is not filled
    part, part_lse = out, lse
    if splits > 1:
        part = q.new_empty(batch, heads, q_length, splits, value_dim, dtype=torch.float32)
        part_lse = q.new_empty(batch, heads, q_length, splits, dtype=torch.float32)
    _split_kernel[(programs * splits,)](
        q,
        k,
        v,
        part,
        part_lse,
        logits,
        pages,
        counts,
        by_row(kv_start, lse),
        kv_end if kv_end is not None else lse,
        *q.stride(),
        *k.stride()[:3],
        *v.stride()[:3],
        *part.stride()[:3],
        *list_strides,
        heads,
        groups,
        q_length,
        capacity,
        splits,
        scale,
        softcap,
        D=head_dim,
        DV=value_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_DV=max(16, triton.next_power_of_2(value_dim)),
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        GROUP=group,
        KV_GROUP=heads // kv_heads,
        PAGE=1 if every else page_size,
        EVERY=every,
        HAS_START=kv_start is not None,
        HAS_END=kv_end is not None,
        HAS_SOFTCAP=softcap > 0,
        WANTS_LOGITS=wants_logits,
        SPLIT=splits > 1,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=max(2, min(tile.num_stages, tiles)),
    )
    if splits > 1:
        merge_splits(part, part_lse, out, lse)
    return out, lse, logits


@page_decode_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: torch.Tensor | None,
    counts: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    scale: float,
    softcap: float,
    page_size: int,
    wants_logits: bool,
    splits: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _outputs(q, k, v, wants_logits)


def _outputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wants_logits: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, q_length, _ = q.shape
    out = q.new_empty(batch, q_length, heads, v.shape[-1]).transpose(1, 2)
    lse = q.new_empty(batch, heads, q_length, dtype=torch.float32)
    return out, lse, q.new_empty((batch, heads, k.shape[2]) if wants_logits else (0,), dtype=torch.float32)


@triton.jit(do_not_specialize=["q_length", "capacity", "splits"])
def _split_kernel(
    q,
    k,
    v,
    o,
    lse,
    logits,
    pages,
    counts,
    kv_start,
    kv_end,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_os,
    stride_pb,
    stride_pl,
    stride_cb,
    stride_cl,
    heads,
    groups,
    q_length,
    capacity,
    splits,
    scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    KV_GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    EVERY: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_END: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WANTS_LOGITS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(q_length * GROUP, BLOCK_M)
    pid = tl.program_id(0)
    i_m = pid % blocks  # these read the same keys: side by side, so that the cache serves all but the first
    pid = pid // blocks
    i_split = pid % splits
    pid = pid // splits
    i_g = pid % groups
    i_b = (pid // groups).to(tl.int64)
    i_hk = (i_g * GROUP // KV_GROUP).to(tl.int64)

    start = 0
    if HAS_START:
        start = tl.load(kv_start + i_b).to(tl.int32)
    end = capacity
    if HAS_END:
        end = tl.load(kv_end).to(tl.int32)
    length = end - start
    tokens = length
    p_list = pages
    if not EVERY:
        tokens = tl.load(counts + i_b * stride_cb + i_g.to(tl.int64) * stride_cl) * PAGE
        p_list = pages + i_b * stride_pb + i_g.to(tl.int64) * stride_pl
    tiles = tl.cdiv(tokens, BLOCK_N)
    first = tiles * i_split // splits
    last = tiles * (i_split + 1) // splits

    # Rows of a tile: the queries one after the other, each with the heads of the group.
    offs_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_q = offs_m // GROUP
    offs_h = i_g * GROUP + offs_m % GROUP
    mask_m = offs_q < q_length
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    p_q = q + i_b * stride_qb + offs_h.to(tl.int64) * stride_qh + offs_q.to(tl.int64) * stride_qs
    mask_q = mask_m[:, None] & (offs_d < D)[None, :]
    b_q = tl.load(p_q[:, None] + (offs_d.to(tl.int64) * stride_qd)[None, :], mask=mask_q, other=0.0)
    limit = tl.where(mask_m, length - q_length + offs_q, -1)  # the last position that each row sees
    p_k = k + i_b * stride_kb + i_hk * stride_kh + offs_d
    p_v = v + i_b * stride_vb + i_hk * stride_vh + offs_dv
    if HAS_START:
        p_k += tl.cast(start, tl.int64) * stride_ks
        p_v += tl.cast(start, tl.int64) * stride_vs
    p_logits = logits + (i_b * heads + offs_h) * capacity

    to_log2 = 1.4426950408889634
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)  # summed at the end: a sum over warps costs a barrier

    page = offs_n
    if not EVERY:
        entry = first * BLOCK_N + offs_n
        page = tl.load(p_list + entry // PAGE, mask=entry < tokens, other=0)
    for t in tl.range(first, last):
        offs_t = t * BLOCK_N + offs_n
        position = offs_t
        if not EVERY:
            position = tl.where(offs_t < tokens, page * PAGE + offs_t % PAGE, length)
            ahead = offs_t + BLOCK_N
            page = tl.load(p_list + ahead // PAGE, mask=ahead < tokens, other=0)
        readable = position < length
        rows = position.to(tl.int64)
        mask_k = readable[:, None]
        if D < BLOCK_D:
            mask_k = mask_k & (offs_d < D)[None, :]
        mask_v = readable[:, None]
        if DV < BLOCK_DV:
            mask_v = mask_v & (offs_dv < DV)[None, :]
        b_k = tl.load(p_k[None, :] + (rows * stride_ks)[:, None], mask=mask_k, other=0.0)
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            s = softcap_logits(s, 1.0, softcap)
        if WANTS_LOGITS:
            wanted = (offs_q == q_length - 1)[:, None] & readable[None, :]
            tl.store(p_logits[:, None] + position[None, :], s, mask=wanted)
        s = tl.where(position[None, :] <= limit[:, None], s * to_log2, -float("inf"))
        b_v = tl.load(p_v[None, :] + (rows * stride_vs)[:, None], mask=mask_v, other=0.0)
        acc, m_i, l_i = add_split_tile(s, b_v, acc, m_i, l_i, PRECISION)

    total = tl.sum(l_i, 1)
    divisor = tl.where(total > 0, total, 1.0)  # without a key the output is 0 and the LSE, as m_i, -inf
    acc = acc / divisor[:, None]
    b_lse = (m_i + tl.math.log2(divisor)) * 0.6931471805599453
    p_o = o + i_b * stride_ob + offs_h.to(tl.int64) * stride_oh + offs_q.to(tl.int64) * stride_os
    p_lse = lse + (i_b * heads + offs_h) * q_length + offs_q
    written = mask_m
    if SPLIT:
        p_o += i_split * DV
        p_lse = lse + ((i_b * heads + offs_h) * q_length + offs_q) * splits + i_split
        written = mask_m & (total > 0)  # the merge skips what has no key
    tl.store(p_lse, b_lse, mask=mask_m)
    mask_o = written[:, None] & (offs_dv < DV)[None, :]
    tl.store(p_o[:, None] + offs_dv[None, :], acc.to(o.dtype.element_ty), mask=mask_o)
