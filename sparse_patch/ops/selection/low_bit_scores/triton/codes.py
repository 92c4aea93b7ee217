"""Smoothing and quantising, for both kernels."""

import triton
import triton.language as tl

EVEN: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2 ** 23: adding and subtracting it rounds half to even


@triton.jit
def scale_of(largest, LARGEST: tl.constexpr, dtype: tl.constexpr):
    """The scale of a group from its largest magnitude, float32, rounded to `dtype`; 1 for a group of zeros."""
    scale = tl.math.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32)).to(dtype).to(tl.float32)
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def to_codes(x, scale, LARGEST: tl.constexpr):
    """Codes, int8, of float32 values with scales of the same shape."""
    rounded = (tl.math.div_rn(x, scale) + EVEN) - EVEN
    return tl.minimum(tl.maximum(rounded, -LARGEST), LARGEST).to(tl.int8)


@triton.jit
def smoothed(p_k, position, valid, mean, stride_ks, stride_kd, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys `[N, BLOCK_D]` minus the mean, in their own dtype; zeros if not valid."""
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    mask = valid[:, None] & (offs_d < D)[None, :]  # [N, BD]
    p_tile = p_k + position.to(tl.int64)[:, None] * stride_ks + offs_d.to(tl.int64)[None, :] * stride_kd  # [N, BD]
    b_k = tl.load(p_tile, mask=mask, other=0.0)  # [N, BD]
    return tl.where(mask, b_k.to(tl.float32) - mean[None, :], 0.0).to(b_k.dtype)
