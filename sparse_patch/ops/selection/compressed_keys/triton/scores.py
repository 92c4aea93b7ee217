"""Triton kernel of the scores of a few thousand tokens.

A program holds some tokens with all query heads of their KV head as the rows of one matrix product. It reads the coarse
compressed keys for the LSE, then the fine ones, and sums the rows of a token. A block's score is a maximum over five
columns; the first of them is the last column of the block before. So for every block the program writes the maximum
over the block's own four columns, and the last of them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import block_of, precision_of
from sparse_patch.kernels.pieces import LOG2_E, add_to_exp_sum, softcap_logits, tiles_of
from sparse_patch.ops.selection.compressed_keys.params import BLOCK, COLUMNS
from sparse_patch.ops.selection.compressed_keys.triton.part import Part, candidates

_BLOCK: tl.constexpr = tl.constexpr(BLOCK)
_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)


@dataclass(frozen=True)
class Tile:
    """The tiling of the scoring kernel: tokens per program, columns per step, warps, pipeline depth."""

    tokens: int
    columns: int
    num_warps: int
    num_stages: int


def tile_of(block_g: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile for a group (a power of two), a head size and a dtype."""
    if dtype == torch.float32:
        return Tile(max(1, 32 // block_g), 32, 8, 1)
    return Tile(max(1, min(128 // block_g, BLOCK)), 128 if head_dim <= 128 else 64, 8, 2)


def write_scores(
    scores: torch.Tensor,
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    scale: float,
    softcap: float,
    part: Part,
    tile: Tile,
) -> None:
    """Write the scores of a part: for every block the maximum over its own columns, and the last of them.

    Args:
        scores: float32 `[2, n]`, is written: one row for each kind, with `part.width` scores per token.
        q: `[B, Hq, Sq, D]`.
        k1: the fine compressed keys, `[B, Hkv, N1, D]`, from `tma_ready`.
        k2: the coarse compressed keys, `[B, Hkv, N2, D]`, likewise.
        scale: scale of the logits.
        softcap: softcap of the logits, 0 for none.
        part: the part to write.
        tile: tiling of the kernel.
    """
    group = q.shape[1] // part.heads
    _score_kernel[part.grid(tile.tokens)](
        q,
        tiles_of(k1, tile.columns),
        tiles_of(k2, tile.columns),
        scores[0],
        scores[1],
        *part.place,
        *q.stride(),
        part.heads,
        part.width,
        *part.always,
        scale,
        softcap,
        D=q.shape[3],
        BLOCK_D=block_of(q.shape[3]),
        GROUP=group,
        BLOCK_G=max(triton.next_power_of_2(group), 16 // tile.tokens),
        TOKENS=tile.tokens,
        BLOCK_N=tile.columns,
        HAS_START=part.has_start,
        HAS_SOFTCAP=softcap > 0,
        PRECISION=precision_of(q.dtype),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@jit(["q_start", "q_length", "first_block", "width", "init", "local", "dense"])
def _score_kernel(
    q,
    k1_desc,
    k2_desc,
    highest,
    last,
    kv_start,
    q_start,
    q_length,
    first_block,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    kv_heads,
    width,
    init,
    local,
    dense,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # 1. The tile: tokens with the query heads of a KV head, and the blocks that they choose among.
    ROWS: tl.constexpr = TOKENS * BLOCK_G
    BLOCKS: tl.constexpr = BLOCK_N // _COLUMNS  # per step
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // kv_heads, i_bh % kv_heads
    start = 0
    if HAS_START:
        start = tl.load(kv_start + i_b).to(tl.int32)
    first = (tl.maximum(q_start - start, 0) // _BLOCK + first_block) * _BLOCK + i_t * TOKENS  # within the row
    block = first // _BLOCK
    begin, low = candidates(block, init, local, dense)
    inside = (first + start < q_start + q_length) & (first + TOKENS + start > q_start)
    if inside & (begin < low):
        # 2. Queries.
        offs_r = tl.arange(0, ROWS)  # [ROWS]
        offs_g = offs_r % BLOCK_G  # [ROWS]
        offs_m = first + offs_r // BLOCK_G  # [ROWS]
        index = (offs_m + start - q_start).to(tl.int64)  # [ROWS]
        real = (index >= tl.maximum(start - q_start, 0)) & (index < q_length) & (offs_g < GROUP)  # [ROWS]
        offs_d = tl.arange(0, BLOCK_D)  # [BD]
        p_q = q + i_b.to(tl.int64) * stride_qb + (i_h * GROUP + offs_g).to(tl.int64)[:, None] * stride_qh  # [ROWS, 1]
        p_q = p_q + index[:, None] * stride_qs + offs_d.to(tl.int64)[None, :] * stride_qd  # [ROWS, BD]
        b_q = tl.load(p_q, mask=real[:, None] & (offs_d < D)[None, :], other=0.0)  # [ROWS, BD]
        to_log2 = LOG2_E * (1.0 if HAS_SOFTCAP else scale)

        # 3. The LSE of each row, from the coarse keys.
        m_i = tl.full([ROWS], -float("inf"), dtype=tl.float32)  # [ROWS]
        l_i = tl.zeros([ROWS], dtype=tl.float32)  # [ROWS]
        full = (block - 1) // BLOCK_N  # steps over coarse keys that every token of the block sees
        for c in tl.range(0, full):
            b_k = k2_desc.load([i_b, i_h, c * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)  # [BN, BD]
            s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [ROWS, BN]
            if HAS_SOFTCAP:
                s = softcap_logits(s, scale, softcap)  # [ROWS, BN]
            m_i, l_i = add_to_exp_sum(m_i, l_i, s * to_log2)  # [ROWS], [ROWS]
        b_k = k2_desc.load([i_b, i_h, full * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)  # [BN, BD]
        s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [ROWS, BN]
        if HAS_SOFTCAP:
            s = softcap_logits(s, scale, softcap)  # [ROWS, BN]
        seen = full * BLOCK_N + tl.arange(0, BLOCK_N)[None, :] < ((offs_m + 1) // _BLOCK - 1)[:, None]  # [ROWS, BN]
        m_i, l_i = add_to_exp_sum(m_i, l_i, tl.where(seen, s * to_log2, -float("inf")))  # [ROWS], [ROWS]
        b_lse = tl.where(offs_g < GROUP, m_i + tl.math.log2(l_i), float("inf"))  # [ROWS]; rows of no head have weight 0

        # 4. Scores of the blocks, from the fine keys.
        slot = i_bh.to(tl.int64) * (tl.num_programs(0) * TOKENS) + i_t * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
        offs_b = tl.arange(0, BLOCKS)  # [BLOCKS]
        is_last = tl.arange(0, _COLUMNS) == _COLUMNS - 1  # [COLUMNS]
        for c in tl.range(tl.maximum(begin - 1, 0) // BLOCKS, tl.cdiv(low, BLOCKS)):
            b_k = k1_desc.load([i_b, i_h, c * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)  # [BN, BD]
            s = tl.dot(b_q, b_k.T, input_precision=PRECISION)  # [ROWS, BN]
            if HAS_SOFTCAP:
                s = softcap_logits(s, scale, softcap)  # [ROWS, BN]
            p = tl.math.exp2(s * to_log2 - b_lse[:, None])  # [ROWS, BN]
            p = tl.sum(tl.reshape(p, (TOKENS, BLOCK_G, BLOCK_N)), 1)  # [TOKENS, BN]
            p = tl.reshape(p, (TOKENS, BLOCKS, _COLUMNS))  # [TOKENS, BLOCKS, COLUMNS]
            p_out = slot[:, None] * width + c * BLOCKS + offs_b[None, :]  # [TOKENS, BLOCKS]
            tl.store(highest + p_out, tl.max(p, 2))
            tl.store(last + p_out, tl.sum(tl.where(is_last[None, None, :], p, 0.0), 2))
