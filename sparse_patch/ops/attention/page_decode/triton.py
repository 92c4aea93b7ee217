"""Triton kernels: split-KV flash decoding.

A program holds the queries of one GQA group (of one query head if each head has its own list) and reads a split of the
group's keys. All splits of a row are equally long, whatever the row's length. Keys and values are gathered row by row,
so pages of any size take the same loop. The list is read one tile ahead; a plan of every page has no list. A second
kernel merges the splits by their LSE. The number of splits follows from sizes that the host knows, so a captured CUDA
graph serves every length of its buffers.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import (
    attention_constants,
    attention_outputs,
    block_of,
    by_row,
    given,
    gpu_properties,
    launch_op,
    rows_in_one_piece,
)
from sparse_patch.kernels.pieces import LN2, LOG2_E, add_split_tile, merge_splits, softcap_logits
from sparse_patch.ops.attention.op import Attended
from sparse_patch.plans import PagePlan


@dataclass(frozen=True)
class Tile:
    """The tiling of the kernel: keys per tile, warps per program, pipeline depth, programs per SM."""

    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


def tile_of(head_dim: int, itemsize: int, capability: tuple[int, int]) -> Tile:
    """The tile for a head size, bytes per element and GPU generation; a static choice, so no length waits for a search.

    A tile of keys and values takes 32 KB. The programs of an SM then keep enough bytes in flight, and three tiles fit.
    """
    block_n = max(16, min(128, 32768 // (2 * block_of(head_dim) * itemsize)))
    warps = 8 if itemsize == 4 else 4  # float32 products use no tensor cores and many registers
    return Tile(block_n, warps, 3 if capability in ((8, 0), (9, 0), (10, 0)) else 2, 2)


def attend(call: AttentionCall, plan: PagePlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.page_decode.attend`."""
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
    return Attended(out, lse, logits if plan.wants_logits else None)


def _outputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, wants_logits: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = (*q.shape[:2], k.shape[2]) if wants_logits else (0,)
    return *attention_outputs(q, v, return_lse=True), q.new_empty(logits, dtype=torch.float32)


@launch_op("page_decode_attention", _outputs)
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
        splits: number of parts that the keys of a row are cut into; 0 for as many as fill the GPU.

    Returns:
        The output `[B, Hq, Sq, Dv]`, in memory as `[B, Sq, Hq, Dv]`; the LSE `[B, Hq, Sq]`; the logits
        `[B, Hq, capacity]`, empty if not asked for.
    """
    out, lse, logits = _outputs(q, k, v, wants_logits)
    batch, heads, q_length, _ = q.shape
    k, v = rows_in_one_piece(k), rows_in_one_piece(v)
    capacity = tokens = k.shape[2]
    lists, page_strides, count_strides = 0, (0, 0), (0, 0)
    if pages is None or counts is None:
        pages = counts = lse  # any tensor; it is not read
    else:
        pages = rows_in_one_piece(pages)
        lists, tokens = pages.shape[1], pages.shape[2] * page_size
        step = int(lists > 1)
        page_strides, count_strides = ((x.stride(0), step * x.stride(1)) for x in (pages, counts))
    sizes = batch, heads, k.shape[1], lists, q_length, tokens, page_size, splits
    flags = softcap > 0, kv_start is not None, kv_end is not None, wants_logits
    grid, groups, splits, constants = _layout(sizes, flags, q.shape[3], v.shape[3], q.dtype, q.device)
    part, part_lse = out, lse
    if splits > 1:
        part = q.new_empty((batch, heads, q_length, splits, v.shape[3]), dtype=torch.float32)
        part_lse = q.new_empty((batch, heads, q_length, splits), dtype=torch.float32)
    _split_kernel[grid](
        q,
        k,
        v,
        part,
        part_lse,
        logits,
        pages,
        counts,
        by_row(kv_start, lse),
        given(kv_end, lse),
        q.stride(),
        k.stride()[:3],
        v.stride()[:3],
        part.stride()[:3],
        page_strides,
        count_strides,
        heads,
        groups,
        q_length,
        capacity,
        splits,
        scale,
        softcap,
        **constants,
    )
    if splits > 1:
        merge_splits(part, part_lse, out, lse)
    return out, lse, logits


@lru_cache(maxsize=1024)
def _layout(
    sizes: tuple[int, ...],
    flags: tuple[bool, ...],
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[tuple[int], int, int, dict[str, Any]]:
    """The grid, the groups of query heads, the splits and the constants of a launch, once for calls of one shape.

    Args:
        sizes: batch, Hq, Hkv, lists of pages (0 for a plan of every page), Sq, the most keys that a row reads, tokens
            of a page, and splits (0 to choose them here).
        flags: whether there are a softcap, starts of rows and an end, and whether logits are wanted.
    """
    batch, heads, kv_heads, lists, q_length, tokens, page_size, splits = sizes
    has_softcap, has_start, has_end, wants_logits = flags
    groups = max(kv_heads, lists)  # groups of query heads that read the same keys
    group = heads // groups
    rows = group * q_length
    block_m = 16 if dtype == torch.float32 else min(64, block_of(rows))
    programs = batch * groups * triton.cdiv(rows, block_m)
    sms, capability = gpu_properties(device)
    tile = tile_of(max(head_dim, value_dim), dtype.itemsize, capability)
    splits = splits or max(1, min(triton.cdiv(tokens, tile.block_n), tile.programs_per_sm * sms // programs))
    tiles = triton.cdiv(tokens, splits * tile.block_n)  # tiles per split; a deeper pipeline would not be filled
    constants = {
        **attention_constants(head_dim, value_dim, dtype, has_softcap),
        "BLOCK_M": block_m,
        "BLOCK_N": tile.block_n,
        "GROUP": group,
        "KV_GROUP": heads // kv_heads,
        "PAGE": page_size if lists else 1,
        "EVERY": not lists,
        "HAS_START": has_start,
        "HAS_END": has_end,
        "WANTS_LOGITS": wants_logits,
        "SPLIT": splits > 1,
        "num_warps": tile.num_warps,
        "num_stages": max(2, min(tile.num_stages, tiles)),
    }
    return (programs * splits,), groups, splits, constants


@jit(["q_length", "capacity", "splits"])
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
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    page_strides,
    count_strides,
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
    stride_qb, stride_qh, stride_qs, stride_qd = q_strides
    stride_kb, stride_kh, stride_ks = k_strides
    stride_vb, stride_vh, stride_vs = v_strides
    stride_ob, stride_oh, stride_os = o_strides
    stride_pb, stride_pl = page_strides
    stride_cb, stride_cl = count_strides
    # 1. The tile: queries of a group, and a split of its keys.
    blocks = tl.cdiv(q_length * GROUP, BLOCK_M)
    pid = tl.program_id(0)
    i_m = pid % blocks  # side by side: these programs read the same keys, so the cache serves all but the first
    pid = pid // blocks
    i_split = pid % splits
    pid = pid // splits
    i_g = pid % groups
    i_b = (pid // groups).to(tl.int64)
    i_hk = (i_g * GROUP // KV_GROUP).to(tl.int64)

    # 2. The keys of the row, and those of the split.
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

    # 3. Queries.
    # Rows of a tile: the queries one after the other, each with the heads of the group.
    offs_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    offs_q = offs_m // GROUP  # [BM]
    offs_h = i_g * GROUP + offs_m % GROUP  # [BM]
    mask_m = offs_q < q_length  # [BM]
    offs_n = tl.arange(0, BLOCK_N)  # [BN]
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    offs_dv = tl.arange(0, BLOCK_DV)  # [BDV]
    p_q = q + i_b * stride_qb + offs_h.to(tl.int64) * stride_qh + offs_q.to(tl.int64) * stride_qs  # [BM]
    mask_q = mask_m[:, None] & (offs_d < D)[None, :]  # [BM, BD]
    b_q = tl.load(p_q[:, None] + (offs_d.to(tl.int64) * stride_qd)[None, :], mask=mask_q, other=0.0)  # [BM, BD]
    limit = tl.where(mask_m, length - q_length + offs_q, -1)  # [BM]; the last position that each row sees
    p_k = k + i_b * stride_kb + i_hk * stride_kh + offs_d  # [BD]
    p_v = v + i_b * stride_vb + i_hk * stride_vh + offs_dv  # [BDV]
    if HAS_START:
        p_k += tl.cast(start, tl.int64) * stride_ks
        p_v += tl.cast(start, tl.int64) * stride_vs
    p_logits = logits + (i_b * heads + offs_h) * capacity  # [BM]

    # 4. Attention to the keys of the split.
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)  # [BM, BDV]
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)  # [BM]
    # [BM, BN]
    l_i = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)  # summed at the end, because a sum over warps costs a barrier

    page = offs_n  # [BN]
    if not EVERY:
        entry = first * BLOCK_N + offs_n  # [BN]
        page = tl.load(p_list + entry // PAGE, mask=entry < tokens, other=0)  # [BN]
    for t in tl.range(first, last):
        offs_t = t * BLOCK_N + offs_n  # [BN]
        position = offs_t  # [BN]
        if not EVERY:
            position = tl.where(offs_t < tokens, page * PAGE + offs_t % PAGE, length)  # [BN]
            ahead = offs_t + BLOCK_N  # [BN]
            page = tl.load(p_list + ahead // PAGE, mask=ahead < tokens, other=0)  # [BN]
        readable = position < length  # [BN]
        rows = position.to(tl.int64)  # [BN]
        mask_k = readable[:, None]  # [BN, 1]
        if D < BLOCK_D:
            mask_k = mask_k & (offs_d < D)[None, :]  # [BN, BD]
        mask_v = readable[:, None]  # [BN, 1]
        if DV < BLOCK_DV:
            mask_v = mask_v & (offs_dv < DV)[None, :]  # [BN, BDV]
        b_k = tl.load(p_k[None, :] + (rows * stride_ks)[:, None], mask=mask_k, other=0.0)  # [BN, BD]
        s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale  # [BM, BN]
        if HAS_SOFTCAP:
            s = softcap_logits(s, 1.0, softcap)  # [BM, BN]
        if WANTS_LOGITS:
            wanted = (offs_q == q_length - 1)[:, None] & readable[None, :]  # [BM, BN]
            tl.store(p_logits[:, None] + position[None, :], s, mask=wanted)
        s = tl.where(position[None, :] <= limit[:, None], s * LOG2_E, -float("inf"))  # [BM, BN]
        b_v = tl.load(p_v[None, :] + (rows * stride_vs)[:, None], mask=mask_v, other=0.0)  # [BN, BDV]
        acc, m_i, l_i = add_split_tile(s, b_v, acc, m_i, l_i, PRECISION)  # [BM, BDV], [BM], [BM, BN]

    # 5. Output and LSE, of the split or of all keys.
    total = tl.sum(l_i, 1)  # [BM]
    divisor = tl.where(total > 0, total, 1.0)  # [BM]; without a key the output is 0 and the LSE, like m_i, is -inf
    acc = acc / divisor[:, None]  # [BM, BDV]
    b_lse = (m_i + tl.math.log2(divisor)) * LN2  # [BM]
    p_o = o + i_b * stride_ob + offs_h.to(tl.int64) * stride_oh + offs_q.to(tl.int64) * stride_os  # [BM]
    p_lse = lse + (i_b * heads + offs_h) * q_length + offs_q  # [BM]
    written = mask_m  # [BM]
    if SPLIT:
        p_o += i_split * DV
        p_lse = lse + ((i_b * heads + offs_h) * q_length + offs_q) * splits + i_split  # [BM]
        written = mask_m & (total > 0)  # [BM]; the merge skips queries without a key
    tl.store(p_lse, b_lse, mask=mask_m)
    mask_o = written[:, None] & (offs_dv < DV)[None, :]  # [BM, BDV]
    tl.store(p_o[:, None] + offs_dv[None, :], acc.to(o.dtype.element_ty), mask=mask_o)
