"""Triton kernel that quantises the keys: one program smooths 128 keys and writes their codes and scales."""

import torch
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import by_row, launch_op
from sparse_patch.ops.selection.low_bit_scores.params import KEY_BLOCK, WORD_KEYS
from sparse_patch.ops.selection.low_bit_scores.triton.codes import scale_of, smoothed, to_codes

_KEYS = 128  # per program


def _outputs(k: torch.Tensor, mean_q: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, kv_heads, kv_length, head_dim = k.shape
    slots = -(-kv_length // WORD_KEYS) * WORD_KEYS
    block_d = max(32, 1 << (head_dim - 1).bit_length())
    codes = k.new_empty(batch, kv_heads, slots, block_d, dtype=torch.int8)
    if mean_q is None:
        scales = k.new_empty(batch, kv_heads, slots // KEY_BLOCK, 1, dtype=torch.float32)
        return codes, scales, k.new_empty(0)
    scales = k.new_empty(batch, kv_heads, slots // KEY_BLOCK, 4)
    return codes, scales, k.new_empty(batch, mean_q.shape[1], slots)


@launch_op("quantise_keys", _outputs)
def quantise_keys(
    k: torch.Tensor,
    mean_k: torch.Tensor,
    mean_q: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    largest_code: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The smoothed keys as codes; int4 with a mean query, int8 without.

    Args:
        k: `[B, Hkv, Skv, D]`.
        mean_k: `[B, Hkv, D]`.
        mean_q: `[B, Hq, D]`; None for int8.
        kv_start: int64 `[B]`, or None.
        largest_code: 7 or 127.

    Returns:
        The tensors of `ops.selection.low_bit_scores.torch.QuantisedKeys`, with D padded by zeros to a power of two.
        `mean_term` is empty for int8.
    """
    codes, scales, mean_term = _outputs(k, mean_q)
    batch, kv_heads, slots, block_d = codes.shape
    steps = slots // _KEYS
    _quantise_kernel[(batch * kv_heads * steps,)](
        k,
        mean_k.contiguous(),
        by_row(mean_q, mean_k),
        codes,
        scales,
        mean_term,
        by_row(kv_start, codes),
        *k.stride(),
        kv_heads,
        mean_q.shape[1] // kv_heads if mean_q is not None else 1,
        steps,
        k.shape[2],
        LARGEST=largest_code,
        D=k.shape[3],
        BLOCK_D=block_d,
        BLOCK_N=_KEYS,
        HAS_START=kv_start is not None,
        HAS_MEAN=mean_q is not None,
        num_warps=4,
    )
    return codes, scales, mean_term


@jit(["steps", "kv_length"])
def _quantise_kernel(
    k,
    mean_k,
    mean_q,
    codes,
    scales,
    mean_term,
    kv_start,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    kv_heads,
    group,
    steps,
    kv_length,
    LARGEST: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_MEAN: tl.constexpr,
):
    # 1. The tile: keys of a KV head, smoothed.
    BLOCKS: tl.constexpr = BLOCK_N // 32
    pid = tl.program_id(0)
    i_n, i_bh = pid % steps, pid // steps
    i_b, i_h = (i_bh // kv_heads).to(tl.int64), (i_bh % kv_heads).to(tl.int64)
    start = 0
    if HAS_START:
        start = tl.load(kv_start + i_b).to(tl.int32)
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    mean = tl.load(mean_k + i_bh.to(tl.int64) * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)  # [BD]
    position = offs_n + start  # [BN]
    p_k = k + i_b * stride_kb + i_h * stride_kh
    b_k = smoothed(p_k, position, position < kv_length, mean, stride_ks, stride_kd, D, BLOCK_D)  # [BN, BD]
    dtype: tl.constexpr = b_k.dtype
    x = b_k.to(tl.float32)  # [BN, BD]

    # 2. Scales.
    # int4: the keys 8a + 2t + e of a block with equal t share a scale.
    by_lane = tl.reshape(tl.max(tl.abs(x), 1), (BLOCKS, 4, 4, 2))  # [BLOCKS, 4, 4, 2]
    first_block = i_bh.to(tl.int64) * steps * BLOCKS + i_n * BLOCKS
    offs_j = tl.arange(0, BLOCKS)  # [BLOCKS]
    if HAS_MEAN:
        scale = scale_of(tl.max(tl.max(by_lane, 3), 1), LARGEST, dtype)  # [BLOCKS, 4]
        tl.store(scales + (first_block + offs_j)[:, None] * 4 + tl.arange(0, 4)[None, :], scale.to(dtype))
        of_key = tl.broadcast_to(scale[:, None, :, None], (BLOCKS, 4, 4, 2))  # [BLOCKS, 4, 4, 2]
    else:
        scale = scale_of(tl.max(tl.reshape(by_lane, (BLOCKS, 32)), 1), LARGEST, tl.float32)  # [BLOCKS]
        tl.store(scales + first_block + offs_j, scale)
        of_key = tl.broadcast_to(scale[:, None, None, None], (BLOCKS, 4, 4, 2))  # [BLOCKS, 4, 4, 2]
    of_key = tl.reshape(of_key, (BLOCK_N,))  # [BN]

    # 3. Codes.
    rows = i_bh.to(tl.int64) * steps * BLOCK_N + offs_n  # [BN]
    b_codes = to_codes(x, tl.broadcast_to(of_key[:, None], (BLOCK_N, BLOCK_D)), LARGEST)  # [BN, BD]
    tl.store(codes + rows[:, None] * BLOCK_D + offs_d[None, :], b_codes)

    # 4. The term of the mean query of each head.
    if HAS_MEAN:
        for i_g in tl.range(0, group):
            i_head = i_bh.to(tl.int64) * group + i_g
            b_mean = tl.load(mean_q + i_head * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)  # [BD]
            term = tl.math.div_rn(tl.sum(x * b_mean[None, :], 1), of_key)  # [BN]
            tl.store(mean_term + i_head * steps * BLOCK_N + offs_n, term.to(dtype))
