"""The influence as a Triton kernel, which never writes attention to memory.

A program computes one block of queries of one head. Its first pass over the keys computes the LSE of each query. Its
second pass goes from the farthest keys to the nearest, so the sum beyond every distance is a running sum. Each program
writes these sums to a row of its own, one entry per distance. The rows are added afterwards in float64, always in the
same order.
"""

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import block_of, rows_in_one_piece
from sparse_patch.kernels.pieces import LOG2_E, add_to_exp_sum


def partial_influence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    grad: torch.Tensor,
    scale: float,
    block: int,
    smallest_rest: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sums of `influence` for each query head: sink `[Hq]`, alone and together `[Hq, blocks]`, float64.

    The arguments are those of `influence`, in float32, bfloat16 or float16, with any strides.
    """
    heads, length, head_dim = q.shape
    value_dim = v.shape[-1]
    blocks = triton.cdiv(length, block)
    mean = (grad.float() * out.float()).sum(-1)
    sink = q.new_zeros(heads, blocks, dtype=torch.float32)
    alone, together = (q.new_zeros(heads, blocks, blocks, dtype=torch.float32) for _ in range(2))
    q, k, v, grad = (rows_in_one_piece(x) for x in (q, k, v, grad))
    wide = max(head_dim, value_dim)
    _influence_kernel[(blocks, heads)](
        q,
        k,
        v,
        grad,
        mean,
        sink,
        alone,
        together,
        *(stride for x in (q, k, v, grad) for stride in x.stride()[:2]),
        heads // k.shape[0],
        length,
        blocks,
        LOG2_E.value * scale,
        smallest_rest,
        D=head_dim,
        DV=value_dim,
        BLOCK_D=block_of(head_dim),
        BLOCK_DV=block_of(value_dim),
        R=block,
        PRECISION="ieee",
        num_warps=4 if wide <= 64 else 8,
        num_stages=2 if wide <= 128 and q.element_size() == 2 else 1,
    )
    sinks, alones, togethers = (x.sum(1, dtype=torch.float64) for x in (sink, alone, together))
    return sinks, alones, togethers


@triton.jit
def _tile(b_q, p_k, stride_ks, j, i, length, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr,
          PRECISION: tl.constexpr):  # fmt: skip
    """Logits in log2 units of the queries at `i` and the R keys from `j` on; `-inf` for the future."""
    offs_j = j + tl.arange(0, R)  # [R]
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_j < length)[None, :] & (offs_d < D)[:, None]  # [BD, R]
    b_k = tl.load(p_k + offs_j.to(tl.int64)[None, :] * stride_ks + offs_d[:, None], mask=mask, other=0.0)  # [BD, R]
    s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale  # [R, R]
    return tl.where(offs_j[None, :] <= i[:, None], s, -float("inf"))


@jit(["length", "blocks"])
def _influence_kernel(
    q, k, v, grad, mean, sink, alone, together,
    stride_qh, stride_qs, stride_kh, stride_ks, stride_vh, stride_vs, stride_gh, stride_gs,
    group, length, blocks, scale, smallest_rest,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_b, i_h = blocks - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)  # the longest rows first
    offs_r, offs_d, offs_v = tl.arange(0, R), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    i = i_b * R + offs_r  # [R]
    rows = i.to(tl.int64)[:, None]  # [R, 1]
    real = (i < length)[:, None]
    p_q = q + i_h * stride_qh + rows * stride_qs + offs_d[None, :]  # [R, BD]
    p_g = grad + i_h * stride_gh + rows * stride_gs + offs_v[None, :]  # [R, BDV]
    b_q = tl.load(p_q, mask=real & (offs_d < D)[None, :], other=0.0)  # [R, BD]
    b_g = tl.load(p_g, mask=real & (offs_v < DV)[None, :], other=0.0)  # [R, BDV]
    b_mean = tl.load(mean + i_h * length + i, mask=i < length, other=0.0)  # [R]
    p_k = k + (i_h // group) * stride_kh
    p_v = v + (i_h // group) * stride_vh

    # 1. The LSE of each query.
    m_i = tl.full([R], -float("inf"), dtype=tl.float32)  # [R]
    l_i = tl.zeros([R], dtype=tl.float32)  # [R]
    for t in tl.range(0, i_b + 1):
        s = _tile(b_q, p_k, stride_ks, t * R, i, length, scale, D, BLOCK_D, R, PRECISION)  # [R, R]
        m_i, l_i = add_to_exp_sum(m_i, l_i, s)
    lse = m_i + tl.math.log2(l_i)  # [R]

    # 2. Influence, from the farthest keys to the nearest.
    no_later = offs_r[None, :] <= offs_r[:, None]  # [R, R]
    each = 0.0  # sum of |E| beyond the current distance
    mass = tl.zeros([R], dtype=tl.float32)  # the same sum of A, for each query
    sums = tl.zeros([R], dtype=tl.float32)  # and the same sum of A G
    row = (i_h * blocks + i_b) * blocks + i_b
    for t in tl.range(0, i_b + 1):
        s = _tile(b_q, p_k, stride_ks, t * R, i, length, scale, D, BLOCK_D, R, PRECISION)  # [R, R]
        a = tl.math.exp2(s - lse[:, None])  # [R, R]
        offs_j = t * R + offs_r
        mask = (offs_j < length)[None, :] & (offs_v < DV)[:, None]  # [BDV, R]
        # [BDV, R]
        b_v = tl.load(p_v + offs_j.to(tl.int64)[None, :] * stride_vs + offs_v[:, None], mask=mask, other=0.0)
        weighted = a * tl.dot(b_g, b_v, input_precision=PRECISION)  # [R, R]
        e = tl.abs(a * b_mean[:, None] - weighted) / tl.maximum(1.0 - a, smallest_rest)  # [R, R]
        e = tl.where((i > 0)[:, None], e, 0.0)
        if t == 0:
            tl.store(sink + i_h * blocks + i_b, tl.sum(e))
        else:
            tl.store(alone + row - t, each + tl.sum(tl.where(no_later, e, 0.0)))
            s_mass = mass + tl.sum(tl.where(no_later, a, 0.0), 1)
            s_sums = sums + tl.sum(tl.where(no_later, weighted, 0.0), 1)
            change = tl.abs(s_mass * b_mean - s_sums) / tl.maximum(1.0 - s_mass, smallest_rest)  # [R]
            tl.store(together + row - t, tl.sum(change))
            each += tl.sum(e)
            mass += tl.sum(a, 1)
            sums += tl.sum(weighted, 1)
