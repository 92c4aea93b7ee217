"""Triton kernel: one pass over the planned blocks and columns of a query block.

A program holds one tile of queries. It reads the blocks below the diagonal, which need no mask, then the single
columns, then the diagonal block with its mask. Programs are ordered so that those that run together share keys in the
cache: one KV head after the other, within it the query blocks from the last (the longest) to the first, and the query
heads of the GQA group side by side. Keys and values are loaded through tensor descriptors: by the copy engine on Hopper
and later, by plain loads on older GPUs. With a `pv_threshold`, a tile's logits decide whether its values are read.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import (
    Tile,
    attention_constants,
    attention_outputs,
    by_row,
    gpu_properties,
    launch_op,
    tile_of,
    tma_ready,
)
from sparse_patch.kernels.pieces import LN2, LOG2_E, add_tile, tile_logits, tiles_of
from sparse_patch.ops.attention.block_sparse.tiles import tile_side
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.backends import why_no_kernel
from sparse_patch.plans import BlockPlan


def tile_that_may_be_left_out(tile: Tile, block_size: int) -> Tile:
    """The tile of plans with a `pv_threshold`. Its size decides what is left out, so it is the same everywhere."""
    side = tile_side(block_size)
    num_stages = tile.num_stages if tile.block_n >= side else 1
    return replace(tile, block_m=side, block_n=side, num_warps=4, num_stages=num_stages)


def why_unsupported(call: AttentionCall, plan: BlockPlan) -> str | None:
    """Why this backend cannot execute the plan on a device that runs its kernel; None if it can."""
    wide = max(call.q.shape[-1], call.v.shape[-1]) > 128
    if plan.pv_threshold is not None and wide and call.q.dtype == torch.float32:
        return "backend triton: pv_threshold, float32 and a head_dim above 128"  # its tiles need too much memory
    return why_no_kernel(call)


def attend(call: AttentionCall, plan: BlockPlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.block_sparse.attend`."""
    out, lse = block_sparse_attention(
        call.q,
        call.k,
        call.v,
        plan.indices,
        plan.counts,
        plan.columns,
        plan.column_counts,
        call.kv_start,
        call.scale,
        call.softcap or 0.0,
        plan.grid.block_size,
        call.q_start,
        plan.pv_threshold,
        return_lse,
    )
    return Attended(out, lse if return_lse else None)


@launch_op("block_sparse_attention", attention_outputs)
def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    columns: torch.Tensor | None,
    column_counts: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    scale: float,
    softcap: float,
    block_size: int,
    q_start: int,
    pv_threshold: float | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's launch; arguments as in `AttentionCall` and `BlockPlan`, softcap 0 for none.

    Returns:
        The output `[B, Hq, Sq, Dv]`, in memory as `[B, Sq, Hq, Dv]`, and the LSE `[B, Hq, Sq]`, empty if not asked for.
    """
    out, lse = attention_outputs(q, v, return_lse)
    if kv_start is not None:  # no query block holds the padding queries
        out.zero_(), lse.fill_(-torch.inf)
    batch, heads, q_length, head_dim = q.shape
    num_query_blocks = indices.shape[2]
    tile = tile_of(max(head_dim, v.shape[3]), q.dtype, block_size, gpu_properties(q.device)[1])
    if pv_threshold is not None:
        tile = tile_that_may_be_left_out(tile, block_size)
    k, v = tma_ready(k), tma_ready(v)
    indices, counts = indices.contiguous(), counts.contiguous()
    grid = (batch * heads * num_query_blocks * (block_size // tile.block_m),)
    _block_sparse_kernel[grid](
        q,
        k,
        v,
        tiles_of(k, tile.block_n),
        tiles_of(v, tile.block_n),
        out,
        lse,
        indices,
        counts,
        by_row(columns, indices),
        by_row(column_counts, counts),
        by_row(kv_start, counts),
        q.stride(),
        k.stride()[:3],
        v.stride()[:3],
        out.stride()[:3],
        heads,
        k.shape[1],
        num_query_blocks,
        q_length,
        q_start,
        indices.shape[3],
        0 if columns is None else columns.shape[3],
        scale,
        softcap,
        pv_threshold or 0.0,
        **attention_constants(q.shape[-1], v.shape[-1], q.dtype, softcap > 0),
        BLOCK=block_size,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        HAS_START=kv_start is not None,
        HAS_COLUMNS=columns is not None and column_counts is not None,
        LEAVES_OUT=pv_threshold is not None,
        RETURN_LSE=return_lse,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, lse


@triton.jit
def _is_near(s, m_i, to_log2, real, pv_threshold):
    """Whether any real query has a logit in a tile that is less than `pv_threshold` below its running maximum."""
    above = tl.where(real, tl.max(s, 1) * to_log2 - m_i, -float("inf"))  # [BM]
    return tl.max(above, 0) + pv_threshold > 0


@jit(["num_query_blocks", "q_length", "q_start", "num_entries", "num_columns"])
def _block_sparse_kernel(
    q,
    k,
    v,
    k_desc,
    v_desc,
    o,
    lse,
    indices,
    counts,
    columns,
    column_counts,
    kv_start,
    q_strides,
    k_strides,
    v_strides,
    o_strides,
    heads,
    kv_heads,
    num_query_blocks,
    q_length,
    q_start,
    num_entries,
    num_columns,
    scale,
    softcap,
    pv_threshold,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LEAVES_OUT: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    stride_qb, stride_qh, stride_qs, stride_qd = q_strides
    stride_kb, stride_kh, stride_ks = k_strides
    stride_vb, stride_vh, stride_vs = v_strides
    stride_ob, stride_oh, stride_os = o_strides
    TILES: tl.constexpr = BLOCK // BLOCK_M  # query tiles of a block
    PARTS: tl.constexpr = BLOCK // BLOCK_N  # key tiles of a block

    # 1. The tile: a query block of a head.
    group = heads // kv_heads
    pid = tl.program_id(0)
    i_g = pid % group
    pid = pid // group
    i_tile = num_query_blocks * TILES - 1 - pid % (num_query_blocks * TILES)
    pid = pid // (num_query_blocks * TILES)
    i_hk = pid % kv_heads
    i_b = pid // kv_heads
    i_h = i_hk * group + i_g
    i_q = i_tile // TILES

    # 2. Queries.
    start = 0
    if HAS_START:
        start = tl.load(kv_start + i_b).to(tl.int32)
    query_block = tl.maximum(q_start - start, 0) // BLOCK + i_q
    first = (i_tile % TILES) * BLOCK_M
    offs_in = first + tl.arange(0, BLOCK_M)  # [BM]; within the block
    offs_m = query_block * BLOCK + offs_in + start - q_start  # [BM]; within the call's queries
    mask_m = (offs_m >= tl.maximum(start - q_start, 0)) & (offs_m < q_length)  # [BM]
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    offs_dv = tl.arange(0, BLOCK_DV)  # [BDV]
    rows = offs_m.to(tl.int64)  # [BM]
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh + rows[:, None] * stride_qs  # [BM, 1]
    p_q = p_q + offs_d.to(tl.int64)[None, :] * stride_qd  # [BM, BD]
    b_q = tl.load(p_q, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)  # [BM, BD]

    # 3. The list: which blocks, and whether the last one lies on the diagonal.
    i_list = (i_b * heads + i_h).to(tl.int64) * num_query_blocks + i_q
    p_list = indices + i_list * num_entries
    count = tl.load(counts + i_list)
    last = tl.load(p_list + tl.maximum(count - 1, 0))
    on_diagonal = (count > 0) & (last == query_block)
    full = count - on_diagonal.to(tl.int32)

    # 4. Blocks below the diagonal, without a mask.
    to_log2 = LOG2_E * (1.0 if HAS_SOFTCAP else scale)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)  # [BM, BDV]
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)  # [BM]
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)  # [BM]

    j_next = tl.load(p_list)  # one tile ahead: a load whose result is needed at once stalls the pipeline
    for t in tl.range(0, full * PARTS):
        j = j_next
        j_next = tl.load(p_list + (t + 1) // PARTS)  # below the diagonal there are fewer blocks than the list can hold
        position = start + j * BLOCK + (t % PARTS) * BLOCK_N
        b_k = k_desc.load([i_b, i_hk, position, 0]).reshape(BLOCK_N, BLOCK_D)  # [BN, BD]
        s = tile_logits(b_q, b_k.T, softcap, HAS_SOFTCAP, scale, PRECISION)  # [BM, BN]
        is_last = (t == full * PARTS - 1) & (full == count)
        if not LEAVES_OUT or (is_last | _is_near(s, m_i, to_log2, mask_m, pv_threshold)):
            b_v = v_desc.load([i_b, i_hk, position, 0]).reshape(BLOCK_N, BLOCK_DV)  # [BN, BDV]
            acc, m_i, l_i = add_tile(s, b_v, acc, m_i, l_i, to_log2, PRECISION)  # [BM, BDV], [BM], [BM]

    # 5. Single columns, gathered.
    if HAS_COLUMNS:
        number = tl.load(column_counts + i_list)
        p_columns = columns + i_list * num_columns
        p_k = k + i_b.to(tl.int64) * stride_kb + i_hk.to(tl.int64) * stride_kh
        p_v = v + i_b.to(tl.int64) * stride_vb + i_hk.to(tl.int64) * stride_vh
        for c in tl.range(0, number, BLOCK_N):
            offs_c = c + tl.arange(0, BLOCK_N)  # [BN]
            mask_c = offs_c < number  # [BN]
            keys = tl.load(p_columns + offs_c, mask=mask_c, other=0).to(tl.int64) + start  # [BN]
            # [BD, BN]
            b_k = tl.load(p_k + keys[None, :] * stride_ks + offs_d[:, None], mask=(offs_d < D)[:, None], other=0.0)
            s = tile_logits(b_q, b_k, softcap, HAS_SOFTCAP, scale, PRECISION)  # [BM, BN]
            s = tl.where(mask_c[None, :], s, -float("inf"))  # [BM, BN]
            # [BN, BDV]
            b_v = tl.load(p_v + keys[:, None] * stride_vs + offs_dv[None, :], mask=(offs_dv < DV)[None, :], other=0.0)
            acc, m_i, l_i = add_tile(s, b_v, acc, m_i, l_i, to_log2, PRECISION)  # [BM, BDV], [BM], [BM]

    # 6. The diagonal block, with its mask.
    if on_diagonal:
        # From the left: every query of the tile sees the first key, so the running maximum is finite from there on.
        for n in tl.range(0, first + BLOCK_M, BLOCK_N):
            position = start + query_block * BLOCK + n
            b_k = k_desc.load([i_b, i_hk, position, 0]).reshape(BLOCK_N, BLOCK_D)  # [BN, BD]
            s = tile_logits(b_q, b_k.T, softcap, HAS_SOFTCAP, scale, PRECISION)  # [BM, BN]
            s = tl.where(offs_in[:, None] >= (n + tl.arange(0, BLOCK_N))[None, :], s, -float("inf"))  # [BM, BN]
            if not LEAVES_OUT or ((n == first) | _is_near(s, m_i, to_log2, mask_m, pv_threshold)):
                b_v = v_desc.load([i_b, i_hk, position, 0]).reshape(BLOCK_N, BLOCK_DV)  # [BN, BDV]
                acc, m_i, l_i = add_tile(s, b_v, acc, m_i, l_i, to_log2, PRECISION)  # [BM, BDV], [BM], [BM]

    # 7. Output and LSE.
    acc = tl.where(l_i[:, None] > 0, acc / l_i[:, None], 0.0)  # [BM, BDV]
    # [BM, BDV]
    p_o = o + i_b.to(tl.int64) * stride_ob + i_h.to(tl.int64) * stride_oh + rows[:, None] * stride_os + offs_dv[None, :]
    tl.store(p_o, acc.to(o.dtype.element_ty), mask=mask_m[:, None] & (offs_dv < DV)[None, :])
    if RETURN_LSE:
        b_lse = (m_i + tl.math.log2(l_i)) * LN2  # [BM]
        tl.store(lse + (i_b * heads + i_h).to(tl.int64) * q_length + rows, b_lse, mask=mask_m)
