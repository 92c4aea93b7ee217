"""Pieces that several Triton kernels share: functions that are compiled into them, and helpers of their launches.

All kernels use the same prefixes: `b_` is a value, `p_` a pointer, `offs_` an offset, `mask_` a mask, `i_` the index of
what a program works on. A comment such as `# [BM, BD]` gives the shape of a tile, `BM` for `BLOCK_M`.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import block_of

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)  # to log2 units: there an exponential is one instruction
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)  # back to natural units
LOWEST: tl.constexpr = tl.constexpr(-3.4028234e38)  # a running maximum before any key; -inf minus it is no NaN


@triton.jit
def softcap_logits(s, scale, softcap):
    """`softcap * tanh(scale * s / softcap)`, with a sigmoid: tanh(x) = 2 sigmoid(2x) - 1."""
    return softcap * (2.0 * tl.sigmoid(s * (2.0 * scale / softcap)) - 1.0)


@triton.jit
def tile_logits(q, k_tile, softcap, HAS_SOFTCAP: tl.constexpr, scale, PRECISION: tl.constexpr):
    """Logits of a tile, in units that `add_tile` multiplies by its `to_log2`."""
    s = tl.dot(q, k_tile, input_precision=PRECISION)  # [BM, BN]
    if HAS_SOFTCAP:
        s = softcap_logits(s, scale, softcap)  # [BM, BN]
    return s


@triton.jit
def add_tile(s, v_tile, acc, m_i, l_i, to_log2, PRECISION: tl.constexpr):
    """Online softmax: add one tile of logits and values. `to_log2` converts the logits to log2 units.

    The maximum `m_i` of a row without a key so far is `LOWEST`. It may be `-inf` if the row sees a key in this tile.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1) * to_log2)  # [BM]
    p = tl.math.exp2(s * to_log2 - m_new[:, None])  # [BM, BN]
    alpha = tl.math.exp2(m_i - m_new)  # [BM]
    l_i = l_i * alpha + tl.sum(p, 1)  # [BM]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)  # [BM, BDV]
    return acc, m_new, l_i


@triton.jit
def add_split_tile(s, v_tile, acc, m_i, l_i, PRECISION: tl.constexpr):
    """Online softmax of few queries: add one tile of logits, in log2 units, and values.

    A row may have no key at all. Its sum is spread over the columns of `l_i`, because a sum over warps costs a barrier.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1))  # [BM]
    base = tl.where(m_new == -float("inf"), 0.0, m_new)  # [BM]; no key yet: -inf minus -inf is NaN
    p = tl.math.exp2(s - base[:, None])  # [BM, BN]
    alpha = tl.math.exp2(m_i - base)  # [BM]
    l_i = l_i * alpha[:, None] + p  # [BM, BN]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)  # [BM, BDV]
    return acc, m_new, l_i


@triton.jit
def add_to_exp_sum(m_i, l_i, s):
    """Online log-sum-exp: add a tile `s` in log2 units; gives each row's maximum and sum of `2 ** (s - maximum)`.

    The sum of a row that is `-inf` throughout stays 0.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1))  # [BM]
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)  # [BM]
    return m_new, l_i * tl.math.exp2(m_i - shift) + tl.sum(tl.math.exp2(s - shift[:, None]), 1)


@triton.jit
def rising(scores):
    """Float32 scores as int32 of the same order. NaN is -inf, and there is one zero, not two."""
    scores = tl.where(scores != scores, -float("inf"), tl.where(scores == 0.0, 0.0, scores))
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def query_blocks_of_row(row_starts, q_start, keys, i_b, SIDE: tl.constexpr):
    """The grid index of a row's first query block, and how many query blocks the row has."""
    start = tl.load(row_starts + i_b).to(tl.int32)
    first = tl.maximum(q_start - start, 0) // SIDE
    return first, tl.cdiv(keys - start, SIDE) - first


def tiles_of(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor that loads tiles `[1, 1, rows, BLOCK_D]` of a tensor `[B, H, S, D]` that `tma_ready` returned."""
    return TensorDescriptor.from_tensor(x, [1, 1, rows, block_of(x.shape[-1])])


def merge_splits(part: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Merge the partial attention of splits of the keys by their LSEs.

    Args:
        part: float32 `[B, Hq, Sq, splits, Dv]`, contiguous; entries whose LSE is `-inf` are not read.
        part_lse: float32 `[B, Hq, Sq, splits]`, contiguous.
        out: `[B, Hq, Sq, Dv]`, is written; its last stride is 1.
        lse: float32 `[B, Hq, Sq]`, contiguous, is written.
    """
    batch, heads, q_length, splits, value_dim = part.shape
    block_s = max(16, triton.next_power_of_2(splits))  # at least 16: few kernel variants while a growing cache is short
    block_dv = min(triton.next_power_of_2(value_dim), max(16, 2048 // block_s))
    _merge_kernel[(batch * heads * q_length, triton.cdiv(value_dim, block_dv))](
        part,
        part_lse,
        out,
        lse,
        *out.stride()[:3],
        heads,
        q_length,
        splits,
        DV=value_dim,
        BLOCK_S=block_s,
        BLOCK_DV=block_dv,
        num_warps=4,
    )


@jit(["q_length", "splits"])
def _merge_kernel(
    part,
    part_lse,
    o,
    lse,
    stride_ob,
    stride_oh,
    stride_os,
    heads,
    q_length,
    splits,
    DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Compute output and LSE of one query from its splits. A program holds some columns of the output."""
    row = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    offs_s = tl.arange(0, BLOCK_S)  # [BS]
    offs_dv = i_d * BLOCK_DV + tl.arange(0, BLOCK_DV)  # [BDV]
    lses = tl.load(part_lse + row * splits + offs_s, mask=offs_s < splits, other=-float("inf"))  # [BS]
    mask = (lses > -float("inf"))[:, None] & (offs_dv < DV)[None, :]  # [BS, BDV]
    parts = tl.load(part + (row * splits + offs_s)[:, None] * DV + offs_dv[None, :], mask=mask, other=0.0)  # [BS, BDV]
    highest = tl.max(lses, 0)
    weights = tl.exp(lses - tl.where(highest == -float("inf"), 0.0, highest))  # [BS]
    total = tl.sum(weights, 0)
    divisor = tl.where(total > 0, total, 1.0)
    merged = tl.sum(parts * weights[:, None], 0) / divisor  # [BDV]
    i_b, i_h, i_q = row // q_length // heads, row // q_length % heads, row % q_length
    p_o = o + i_b * stride_ob + i_h * stride_oh + i_q * stride_os
    tl.store(p_o + offs_dv, merged.to(o.dtype.element_ty), mask=offs_dv < DV)
    if i_d == 0:
        tl.store(lse + row, highest + tl.log(divisor))


@triton.jit
def window_at(p_window, position):
    """Windows of queries at positions. `p_window` points to `(most, base, slope, least)` of a `GrowingWindow`."""
    grown = (tl.load(p_window + 1) + tl.load(p_window + 2) * (position.to(tl.int64) + 1)) >> 16
    return tl.minimum(tl.maximum(grown, tl.load(p_window + 3)), tl.load(p_window)).to(tl.int32)
