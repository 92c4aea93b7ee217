"""Triton kernel: a program holds a tile of neighbouring tokens with all query heads of their KV head.

These are the rows of one matrix product, so every block is read once for all of them. Blocks that every token of the
tile reads need no mask below the diagonal. Of the chosen blocks, the program reads those that any token of the tile
reads; a token gives weight 0 to blocks that it does not read. Neighbours choose similar blocks. If they do not, no more
keys are loaded than for each token by itself.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import (
    attention_constants,
    attention_outputs,
    by_row,
    gpu_properties,
    launch_op,
    tma_ready,
)
from sparse_patch.kernels.pieces import LN2, LOG2_E, tile_logits, tiles_of
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.backends import why_no_kernel
from sparse_patch.plans import BLOCK_BITS, TokenBlockPlan

_BITS: tl.constexpr = tl.constexpr(BLOCK_BITS)


@dataclass(frozen=True)
class Tile:
    """The tiling of the kernel.

    Attributes:
        block_n: keys per step.
        num_warps: warps per program.
        num_stages: pipeline depth.
        registers: most registers per thread, so that two programs share a multiprocessor; None if unlimited.
    """

    block_n: int
    num_warps: int
    num_stages: int
    registers: int | None = None


def tile_of(rows: int, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """The tile for a number of rows (tokens times heads), a head size, dtype and GPU generation."""
    wide = head_dim > 128
    if dtype == torch.float32:
        return Tile(16, 16 if wide else 8, 1)
    if capability < (9, 0):
        return Tile(32 if wide else 64, 4 if rows <= 64 else 8, 2)
    if wide:
        return Tile(64, 8, 2)
    return Tile(64, 4, 3) if rows <= 64 else Tile(64, 8, 2, registers=128)


def why_unsupported(call: AttentionCall, plan: TokenBlockPlan) -> str | None:
    """Why this backend cannot execute the plan on a device that runs its kernel; None if it can."""
    if plan.tile * call.group_size > 256:
        return f"backend triton: {call.group_size} query heads of a KV head"
    return why_no_kernel(call)


def attend(call: AttentionCall, plan: TokenBlockPlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.token_blocks.attend`."""
    out, lse = token_block_attention(
        call.q,
        call.k,
        call.v,
        plan.entries,
        plan.counts,
        call.kv_start,
        call.scale,
        call.softcap or 0.0,
        plan.grid.block_size,
        plan.tile,
        plan.init_blocks,
        plan.local_blocks,
        plan.dense_blocks,
        call.q_start,
        return_lse,
    )
    return Attended(out, lse if return_lse else None)


@launch_op("token_block_attention", attention_outputs)
def token_block_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    entries: torch.Tensor,
    counts: torch.Tensor,
    kv_start: torch.Tensor | None,
    scale: float,
    softcap: float,
    block_size: int,
    token_tile: int,
    init_blocks: int,
    local_blocks: int,
    dense_blocks: int,
    q_start: int,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's launch; arguments as in `AttentionCall` and `TokenBlockPlan`, softcap 0 for none.

    Returns:
        The output `[B, Hq, Sq, Dv]`, in memory as `[B, Sq, Hq, Dv]`, and the LSE `[B, Hq, Sq]`, empty if not asked for.
    """
    out, lse = attention_outputs(q, v, return_lse)
    if kv_start is not None:  # no tile holds the padding queries
        out.zero_(), lse.fill_(-torch.inf)
    batch, heads, q_length, head_dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[3]
    group = heads // kv_heads
    block_g = max(triton.next_power_of_2(group), 16 // token_tile)
    tile = tile_of(token_tile * block_g, max(head_dim, value_dim), q.dtype, gpu_properties(q.device)[1])
    k, v = tma_ready(k), tma_ready(v)
    entries, counts = entries.contiguous(), counts.contiguous()
    tiles = entries.shape[2]
    _token_block_kernel[(batch * kv_heads * tiles,)](
        q,
        tiles_of(k, tile.block_n),
        tiles_of(v, tile.block_n),
        out,
        lse,
        entries,
        counts,
        by_row(kv_start, counts),
        q.stride(),
        out.stride()[:3],
        heads,
        kv_heads,
        tiles,
        q_length,
        q_start,
        entries.shape[3],
        init_blocks,
        local_blocks,
        dense_blocks,
        scale,
        softcap,
        **attention_constants(q.shape[-1], v.shape[-1], q.dtype, softcap > 0),
        BLOCK=block_size,
        BLOCK_N=tile.block_n,
        GROUP=group,
        BLOCK_G=block_g,
        TILE=token_tile,
        HAS_START=kv_start is not None,
        RETURN_LSE=return_lse,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.registers,
    )
    return out, lse


@triton.jit
def _next_block(u, inits, fixed, low, p_list, count):
    """Block `u` of a tile, among the blocks below its diagonal, and which tokens of the tile read it."""
    listed = tl.load(p_list + u - fixed, mask=(u >= fixed) & (u < fixed + count), other=0)
    block = tl.where(u < inits, u, tl.where(u < fixed, low + u - inits, listed >> _BITS))
    return block, tl.where(u < fixed, -1, listed)


@jit(["tiles", "q_length", "q_start", "num_entries", "init", "local", "dense"])
def _token_block_kernel(
    q,
    k_desc,
    v_desc,
    o,
    lse,
    entries,
    counts,
    kv_start,
    q_strides,
    o_strides,
    heads,
    kv_heads,
    tiles,
    q_length,
    q_start,
    num_entries,
    init,
    local,
    dense,
    scale,
    softcap,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TILE: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    stride_qb, stride_qh, stride_qs, stride_qd = q_strides
    stride_ob, stride_oh, stride_os = o_strides
    # 1. The tile: neighbouring tokens, with the heads of a group. Its rows are R = TILE * BLOCK_G.
    PARTS: tl.constexpr = BLOCK // BLOCK_N  # key tiles of a block
    pid = tl.program_id(0)
    i_tile = tiles - 1 - pid % tiles
    i_hk = pid // tiles % kv_heads
    i_b = pid // tiles // kv_heads
    start = 0
    if HAS_START:
        start = tl.load(kv_start + i_b).to(tl.int32)
    first = tl.maximum(q_start - start, 0) // BLOCK * BLOCK + i_tile * TILE  # position of the tile within the row
    if (first + start < q_start + q_length) & (first + TILE + start > q_start):
        # 2. Queries.
        offs_r = tl.arange(0, TILE * BLOCK_G)  # [R]
        offs_t, offs_g = offs_r // BLOCK_G, offs_r % BLOCK_G  # [R], [R]
        offs_m = first + offs_t  # [R]; positions within the row
        index = (offs_m + start - q_start).to(tl.int64)  # [R]; within the call's queries
        mask_r = (index >= tl.maximum(start - q_start, 0)) & (index < q_length) & (offs_g < GROUP)  # [R]
        offs_h = (i_hk * GROUP + offs_g).to(tl.int64)  # [R]
        offs_d = tl.arange(0, BLOCK_D)  # [BD]
        offs_dv = tl.arange(0, BLOCK_DV)  # [BDV]
        p_q = q + i_b.to(tl.int64) * stride_qb + offs_h[:, None] * stride_qh + index[:, None] * stride_qs  # [R, 1]
        p_q = p_q + offs_d.to(tl.int64)[None, :] * stride_qd  # [R, BD]
        b_q = tl.load(p_q, mask=mask_r[:, None] & (offs_d < D)[None, :], other=0.0)  # [R, BD]

        # 3. The list: blocks that all tokens read, and blocks that some tokens read.
        i_list = (i_b * kv_heads + i_hk).to(tl.int64) * tiles + i_tile
        p_list = entries + i_list * num_entries
        count = tl.load(counts + i_list)
        block = first // BLOCK
        low = tl.where(block < dense, 0, tl.maximum(block - local, 0))  # first block of the window
        inits = tl.minimum(init, low)
        fixed = inits + block - low  # blocks that all tokens read, below the diagonal

        # 4. The diagonal block, with its mask.
        to_log2 = LOG2_E * (1.0 if HAS_SOFTCAP else scale)
        acc = tl.zeros([TILE * BLOCK_G, BLOCK_DV], dtype=tl.float32)  # [R, BDV]
        m_i = tl.full([TILE * BLOCK_G], -float("inf"), dtype=tl.float32)  # [R]
        l_i = tl.zeros([TILE * BLOCK_G], dtype=tl.float32)  # [R]

        # The diagonal first, from the left: every token sees the first key, so the maximum is finite from there on.
        for n in tl.range(block * BLOCK, first + TILE, BLOCK_N):
            b_k = k_desc.load([i_b, i_hk, start + n, 0]).reshape(BLOCK_N, BLOCK_D)  # [BN, BD]
            s = tile_logits(b_q, b_k.T, softcap, HAS_SOFTCAP, scale, PRECISION)  # [R, BN]
            s = tl.where(offs_m[:, None] >= (n + tl.arange(0, BLOCK_N))[None, :], s, -float("inf"))  # [R, BN]
            m_new = tl.maximum(m_i, tl.max(s, 1) * to_log2)  # [R]
            p = tl.math.exp2(s * to_log2 - m_new[:, None])  # [R, BN]
            alpha = tl.math.exp2(m_i - m_new)  # [R]
            l_i = l_i * alpha + tl.sum(p, 1)  # [R]
            b_v = v_desc.load([i_b, i_hk, start + n, 0]).reshape(BLOCK_N, BLOCK_DV)  # [BN, BDV]
            acc = tl.dot(p.to(b_v.dtype), b_v, acc * alpha[:, None], input_precision=PRECISION)  # [R, BDV]
            m_i = m_new

        # 5. Blocks below the diagonal, each for the tokens that read it.
        j_next, readers_next = _next_block(0, inits, fixed, low, p_list, count)  # one ahead: see block_sparse
        for u in tl.range(0, (fixed + count) * PARTS):
            j, readers = j_next, readers_next
            j_next, readers_next = _next_block((u + 1) // PARTS, inits, fixed, low, p_list, count)
            position = start + j * BLOCK + u % PARTS * BLOCK_N
            b_k = k_desc.load([i_b, i_hk, position, 0]).reshape(BLOCK_N, BLOCK_D)  # [BN, BD]
            s = tile_logits(b_q, b_k.T, softcap, HAS_SOFTCAP, scale, PRECISION)  # [R, BN]
            reads = (readers >> offs_t) & 1 != 0  # [R]
            m_new = tl.maximum(m_i, tl.where(reads, tl.max(s, 1) * to_log2, -float("inf")))  # [R]
            p = tl.math.exp2(s * to_log2 - tl.where(reads, m_new, float("inf"))[:, None])  # [R, BN]
            alpha = tl.math.exp2(m_i - m_new)  # [R]
            l_i = l_i * alpha + tl.sum(p, 1)  # [R]
            b_v = v_desc.load([i_b, i_hk, position, 0]).reshape(BLOCK_N, BLOCK_DV)  # [BN, BDV]
            acc = tl.dot(p.to(b_v.dtype), b_v, acc * alpha[:, None], input_precision=PRECISION)  # [R, BDV]
            m_i = m_new

        # 6. Output and LSE.
        acc = acc / l_i[:, None]  # [R, BDV]
        p_o = o + i_b.to(tl.int64) * stride_ob + offs_h[:, None] * stride_oh + index[:, None] * stride_os  # [R, 1]
        tl.store(p_o + offs_dv[None, :], acc.to(o.dtype.element_ty), mask=mask_r[:, None] & (offs_dv < DV)[None, :])
        if RETURN_LSE:
            b_lse = (m_i + tl.math.log2(l_i)) * LN2  # [R]
            tl.store(lse + (i_b * heads + offs_h) * q_length + index, b_lse, mask=mask_r)
