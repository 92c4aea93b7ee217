"""Triton kernel of the merge of rankings.

A program ranks some of a head's tokens: it counts the head's tokens that come before each of them. Nothing is sorted.
The best place of a token is a maximum over heads, which does not depend on their order, so it is an atomic one. Scores
are not negative, so it is a maximum of their bits.
"""

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.launch import launch_op
from sparse_patch.kernels.pieces import rising

_BLOCK_M, _BLOCK_N = 128, 512  # tokens that a program ranks, and those that it compares them with at once


def _outputs(scores: torch.Tensor) -> torch.Tensor:
    return scores.new_empty(scores.shape[0], scores.shape[-1])


@launch_op("merge_ranks", _outputs)
def merge(
    scores: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor, k: int, first_head: int, heads: int
) -> torch.Tensor:
    """See `ops.selection.rank_merge.torch.merge`."""
    merged = _outputs(scores).zero_()
    batch, here, size = scores.shape
    number = tokens.shape[-1]
    if not number:
        return merged
    _rank_kernel[(triton.cdiv(number, _BLOCK_M), batch * here)](
        scores,
        tokens.contiguous(),
        counts.contiguous(),
        merged.view(torch.int32),
        scores.stride(),
        here,
        size,
        number,
        first_head,
        heads,
        k * heads,
        BLOCK_M=_BLOCK_M,
        BLOCK_N=min(_BLOCK_N, max(32, triton.next_power_of_2(number))),
        num_warps=8,
    )
    return merged


@triton.jit(do_not_specialize=["size", "number", "first_head", "best"])
def _rank_kernel(
    scores, tokens, counts, merged, score_strides, here, size, number, first_head, heads, best,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_t, i_list = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_list // here, i_list % here
    stride_b, stride_h, stride_n = score_strides
    count = tl.load(counts + i_list)
    begin = i_t * BLOCK_M
    offs_m = begin + tl.arange(0, BLOCK_M)  # [BM]
    mask_m = offs_m < count  # [BM]
    p_scores = scores + i_b * stride_b + i_h * stride_h
    token = tl.load(tokens + i_list * number + offs_m, mask=mask_m, other=0)  # [BM]
    key = rising(tl.load(p_scores + token.to(tl.int64) * stride_n, mask=mask_m, other=0.0))  # [BM]

    # Tokens with a higher score come before, and those with the same score that are listed before.
    equal = (key[:, None] == key[None, :]) & (offs_m[:, None] < offs_m[None, :])  # [BM, BM]
    rank = tl.sum(equal.to(tl.int32), 0)  # [BM]
    for n in tl.range(0, tl.where(begin < count, count, 0), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)  # [BN]
        mask_n = offs_n < count  # [BN]
        other = tl.load(tokens + i_list * number + offs_n, mask=mask_n, other=0)  # [BN]
        other = rising(tl.load(p_scores + other.to(tl.int64) * stride_n, mask=mask_n, other=0.0))  # [BN]
        other = tl.where(mask_n, other + (offs_n < begin).to(tl.int32), -0x80000000)  # [BN]; one more wins a tie
        rank += tl.sum((other[:, None] > key[None, :]).to(tl.int32), 0)  # [BM]; a thread sums most of it
    place = (best - rank * heads - first_head - i_h.to(tl.int32)).to(tl.float32)  # [BM]
    tl.atomic_max(merged + i_b * size + token, place.to(tl.int32, bitcast=True), mask=mask_m, sem="relaxed")
