"""Triton kernel of the pages' scores: one pass over the logits, whatever the number of heads.

A program has some pages of a row. It loads the logits of several heads at once, so that many loads are in flight. Each
thread has all heads of its tokens, so the maximum over heads costs no exchange between threads.
"""

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import launch_op

_BLOCK = 128  # tokens per program, 4 per thread; many small programs hide the memory latency of the logits


def page_scores(logits: torch.Tensor, lse: torch.Tensor, lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    """See `ops.selection.page_scores`; `page_size` is a power of two up to 256."""
    return score_pages(logits, lse, lengths, page_size)


def _outputs(logits: torch.Tensor, page_size: int) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], -(-logits.shape[2] // page_size))


@launch_op("page_scores", _outputs)
def score_pages(logits: torch.Tensor, lse: torch.Tensor, lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    """The kernel's launch; arguments and result as in `ops.selection.page_scores`."""
    scores = _outputs(logits, page_size)
    batch, heads, size = logits.shape
    block = max(_BLOCK, page_size)
    _score_kernel[(triton.cdiv(size, block), batch)](
        logits,
        lse.contiguous(),
        lengths,
        scores,
        *logits.stride(),
        lengths.stride(0),
        heads,
        size,
        scores.shape[1],
        HEADS=min(16, triton.next_power_of_2(heads)),
        BLOCK=block,
        P=page_size,
        num_warps=block // 128,
    )
    return scores


@jit(["pages"])
def _score_kernel(
    logits, lse, lengths, scores, stride_b, stride_h, stride_s, stride_length, heads, size, pages,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    i_block, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + i_b * stride_length).to(tl.int32)
    first = i_block * BLOCK
    offs_s = first + tl.arange(0, BLOCK)  # [BLOCK]
    top = tl.full([BLOCK], -float("inf"), dtype=tl.float32)  # [BLOCK]; largest log probability of each token
    for h in tl.range(0, tl.where(first < length, heads, 0), HEADS):
        offs_h = h + tl.arange(0, HEADS)  # [HEADS]
        p_logits = logits + i_b * stride_b + offs_h.to(tl.int64)[:, None] * stride_h  # [HEADS, 1]
        p_logits = p_logits + offs_s.to(tl.int64)[None, :] * stride_s  # [HEADS, BLOCK]
        # Logits after the row's end are loaded too, because a mask that may end anywhere forbids wide loads.
        mask = (offs_h < heads)[:, None] & (offs_s < size)[None, :]  # [HEADS, BLOCK]
        b_logits = tl.load(p_logits, mask=mask, other=-float("inf"))  # [HEADS, BLOCK]
        b_lse = tl.load(lse + i_b * heads + offs_h, mask=offs_h < heads, other=0.0)  # [HEADS]
        top = tl.maximum(top, tl.max(b_logits - b_lse[:, None], 0))  # [BLOCK]
    probability = tl.where(offs_s < length, tl.exp(top), 0.0)  # [BLOCK]
    sums = tl.sum(tl.reshape(probability, (BLOCK // P, P)), 1)  # [BLOCK / P]
    offs_u = i_block * (BLOCK // P) + tl.arange(0, BLOCK // P)  # [BLOCK / P]
    sums = tl.where(offs_u * P < length, sums, -float("inf"))  # [BLOCK / P]
    tl.store(scores + i_b * pages + offs_u, sums, mask=offs_u < pages)
