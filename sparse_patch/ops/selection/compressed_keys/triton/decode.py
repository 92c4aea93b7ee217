"""Triton kernels of the scores for one query: the LSE of every head, then the blocks, from the pages' logits.

The logit of a compressed key is the mean of its pages' logits, so neither kernel reads a key.
"""

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import launch_op
from sparse_patch.kernels.pieces import LOG2_E, add_to_exp_sum, softcap_logits
from sparse_patch.ops.selection.compressed_keys.params import (
    BLOCK,
    COARSE,
    COLUMNS,
    LARGEST,
    STRIDE,
    CompressedKeysParams,
)

_BLOCK: tl.constexpr = tl.constexpr(BLOCK)
_STRIDE: tl.constexpr = tl.constexpr(STRIDE)
_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)
_COARSE: tl.constexpr = tl.constexpr(COARSE)
_LARGEST: tl.constexpr = tl.constexpr(LARGEST)


def block_scores(
    of_pages: torch.Tensor,
    lengths: torch.Tensor,
    kv_heads: int,
    scale: float,
    softcap: float | None,
    rule: CompressedKeysParams,
) -> torch.Tensor:
    """See `ops.selection.compressed_keys.torch.block_scores`."""
    always = rule.init_blocks, rule.local_blocks
    return score_blocks(of_pages, lengths, kv_heads, scale, softcap or 0.0, *always)


def _outputs(of_pages: torch.Tensor, kv_heads: int) -> torch.Tensor:
    return of_pages.new_empty(len(of_pages), kv_heads, -(-of_pages.shape[-1] // COLUMNS))


@launch_op("score_blocks", _outputs)
def score_blocks(
    of_pages: torch.Tensor,
    lengths: torch.Tensor,
    kv_heads: int,
    scale: float,
    softcap: float,
    init_blocks: int,
    local_blocks: int,
) -> torch.Tensor:
    """The kernels' launches; softcap 0 for none."""
    batch, heads, pages = of_pages.shape
    of_pages = of_pages.contiguous()
    lse = of_pages.new_empty(batch, heads)
    coarse = max(16, min(1024, triton.next_power_of_2(triton.cdiv(pages, COARSE))))
    _lse_kernel[(batch * heads,)](
        of_pages,
        lengths,
        lse,
        lengths.stride(0),
        heads,
        pages,
        scale,
        softcap,
        BLOCK_N=coarse,
        HAS_SOFTCAP=softcap > 0,
        num_warps=4,
    )
    scores = _outputs(of_pages, kv_heads)
    number = scores.shape[-1]
    block_b = 32
    _block_kernel[(triton.cdiv(number, block_b), batch * kv_heads)](
        of_pages,
        lengths,
        lse,
        scores,
        lengths.stride(0),
        kv_heads,
        pages,
        number,
        init_blocks,
        local_blocks,
        scale,
        softcap,
        GROUP=heads // kv_heads,
        BLOCK_B=block_b,
        HAS_SOFTCAP=softcap > 0,
        num_warps=4,
    )
    return scores


@jit(["pages"])
def _lse_kernel(
    of_pages,
    lengths,
    lse,
    stride_l,
    heads,
    pages,
    scale,
    softcap,
    BLOCK_N: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    i_bh = tl.program_id(0)
    length = tl.load(lengths + i_bh // heads * stride_l).to(tl.int32)
    number = tl.maximum(length // (_COARSE * _STRIDE) - 1, 0)  # coarse keys that end within the row
    p_pages = of_pages + i_bh.to(tl.int64) * pages
    offs_p = tl.arange(0, 2 * _COARSE)  # [2 * COARSE]
    to_log2 = LOG2_E * (1.0 if HAS_SOFTCAP else scale)
    m_i = tl.full([1], -float("inf"), dtype=tl.float32)  # [1]
    l_i = tl.zeros([1], dtype=tl.float32)  # [1]
    for n in tl.range(0, number, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)  # [BN]
        real = offs_n < number  # [BN]
        # [BN, 2 * COARSE]
        s = tl.load(p_pages + offs_n[:, None] * _COARSE + offs_p[None, :], mask=real[:, None], other=0.0)
        s = tl.sum(s, 1) / (2 * _COARSE)  # [BN]
        if HAS_SOFTCAP:
            s = softcap_logits(s, scale, softcap)  # [BN]
        m_i, l_i = add_to_exp_sum(m_i, l_i, tl.where(real, s * to_log2, -float("inf"))[None, :])
    tl.store(lse + i_bh + tl.arange(0, 1), m_i + tl.math.log2(tl.where(l_i > 0, l_i, 1.0)))  # in log2 units


@jit(["pages", "number", "init", "local"])
def _block_kernel(
    of_pages,
    lengths,
    lse,
    scores,
    stride_l,
    kv_heads,
    pages,
    number,
    init,
    local,
    scale,
    softcap,
    GROUP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + i_bh // kv_heads * stride_l).to(tl.int32)
    offs_b = i_n * BLOCK_B + tl.arange(0, BLOCK_B)  # [BB]
    offs_c = tl.arange(0, 2 * _COLUMNS)  # [2 * COLUMNS]; only the first COLUMNS + 1 count
    column = offs_b[:, None] * _COLUMNS - 1 + offs_c[None, :]  # [BB, 2 * COLUMNS]
    seen = (column >= 0) & (offs_c <= _COLUMNS)[None, :] & ((column + 2) * _STRIDE <= length)  # [BB, 2 * COLUMNS]
    to_log2 = LOG2_E * (1.0 if HAS_SOFTCAP else scale)
    total = tl.zeros([BLOCK_B, 2 * _COLUMNS], dtype=tl.float32)  # [BB, 2 * COLUMNS]
    for g in tl.range(0, GROUP):
        i_h = i_bh.to(tl.int64) * GROUP + g
        p_pages = of_pages + i_h * pages + column  # [BB, 2 * COLUMNS]
        # [BB, 2 * COLUMNS]
        s = (tl.load(p_pages, mask=seen, other=0.0) + tl.load(p_pages + 1, mask=seen, other=0.0)) * 0.5
        if HAS_SOFTCAP:
            s = softcap_logits(s, scale, softcap)  # [BB, 2 * COLUMNS]
        b_lse = tl.load(lse + i_h)
        total += tl.math.exp2(s * to_log2 - tl.where(b_lse == -float("inf"), float("inf"), b_lse))  # [BB, 2 * COLUMNS]
    score = tl.max(tl.where(seen, tl.minimum(total, _LARGEST), 0.0), 1)  # [BB]
    own = (length - 1) // _BLOCK
    always = (offs_b < init) | ((offs_b >= own - local) & (offs_b <= own))  # [BB]
    p_scores = scores + i_bh.to(tl.int64) * number + offs_b  # [BB]
    tl.store(p_scores, tl.where(always, float("inf"), score), mask=offs_b < number)
