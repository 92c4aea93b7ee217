"""Triton kernel of the lists of pages: one program chooses from one list, which it holds in registers.

It bisects for the smallest chosen score, over the scores' bits as numbers of the same order, until exactly k scores are
at or above it or the bits are exhausted. Then it writes the chosen pages in order. If a list is too long, the kernel
chooses first from its parts and then from the pages that the parts gave: a page among the k best of a list is among the
k best of its part. Parts keep the order, so the lower page wins a tie there as well.
"""

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.launch import given, launch_op

_PART = (2048, 8192)  # fewest and most pages of a part
_WIDEST = 32768  # pages that a program can hold


def why_unsupported(scores: torch.Tensor, k: int) -> str | None:
    """Why the kernel cannot choose k pages; None if it can."""
    size = scores.shape[-1]
    if k < 1 or _block(size, k) > _WIDEST:
        return f"the kernel does not choose {k} of {size} pages"
    return None


def top_pages(
    scores: torch.Tensor, limits: torch.Tensor, k: int, page_size: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.top_pages`; `limits` is int64 `[B, L]` and `k` at most N."""
    return select_pages(scores, limits, k, page_size)


def _outputs(scores: torch.Tensor, k: int, *, parts: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    batch, lists, _ = scores.shape
    pages = torch.empty(batch, lists, parts * k, dtype=torch.int32, device=scores.device)
    return pages, torch.empty(batch, lists * parts, dtype=torch.int32, device=scores.device)


@launch_op("top_pages", _outputs)
def select_pages(
    scores: torch.Tensor, limits: torch.Tensor, k: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's launches; arguments and results as in `top_pages`."""
    entries, candidates = scores.shape[-1], None
    while (block := _block(entries, k)) < entries:
        candidates = _select(scores, candidates, limits, k, page_size, block, entries)[0]
        entries = candidates.shape[-1]
    return _select(scores, candidates, limits, k, page_size, block, entries)


def _block(entries: int, k: int) -> int:
    """Entries that a program takes, for lists of `entries`: all of them, or a part.

    Small parts are quick and run side by side, but their results have to be chosen from again. So a part is 8k long if
    that lies within bounds, and never shorter than 2k, which halves the list.
    """
    least, most = _PART
    part = max(least, min(triton.next_power_of_2(8 * k), most), triton.next_power_of_2(2 * k))
    return part if entries > min(2 * part, _WIDEST) else max(32, triton.next_power_of_2(entries))


def _select(
    scores: torch.Tensor,
    candidates: torch.Tensor | None,
    limits: torch.Tensor,
    k: int,
    page_size: int,
    block: int,
    entries: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each part, of all pages or of the candidates `[B, L, entries]`; -1 if a part has fewer."""
    batch, lists, size = scores.shape
    parts = triton.cdiv(entries, block)
    pages, counts = _outputs(scores, k, parts=parts)
    _select_kernel[(parts, batch * lists)](
        scores,
        given(candidates, scores),
        limits,
        pages,
        counts,
        *scores.stride(),
        *limits.stride(),
        lists,
        size,
        entries,
        k,
        page_size,
        0 if parts == 1 else -1,
        BLOCK=block,
        HAS_CANDIDATES=candidates is not None,
        num_warps=min(max(block // 512, 1), 32),
        maxnreg=64 if parts > 1 else None,  # many programs: two on a multiprocessor
    )
    return pages, counts


@triton.jit
def _rising(scores):
    """Scores as int32 of the same order. NaN is -inf, and there is one zero, not two."""
    scores = tl.where(scores != scores, -float("inf"), tl.where(scores == 0.0, 0.0, scores))
    bits = scores.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=["entries", "k", "fill"])
def _select_kernel(
    scores, candidates, limits, pages, counts, stride_b, stride_l, stride_n, stride_limit_b, stride_limit_l,
    lists, size, entries, k, page_size, fill, BLOCK: tl.constexpr, HAS_CANDIDATES: tl.constexpr,
):  # fmt: skip
    i_part, i_list = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_l = i_list // lists, i_list % lists
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    page = i_part * BLOCK + offs  # [BLOCK]
    if HAS_CANDIDATES:
        page = tl.load(candidates + i_list * entries + page, mask=page < entries, other=-1)  # [BLOCK]
        real, there = page >= 0, page >= 0  # [BLOCK], [BLOCK]
    else:
        limit = tl.cdiv(tl.load(limits + i_b * stride_limit_b + i_l * stride_limit_l), page_size)
        real, there = page < tl.minimum(limit, size), page < size  # a mask that may end anywhere forbids wide loads
    p_scores = scores + i_b * stride_b + i_l * stride_l + page.to(tl.int64) * stride_n  # [BLOCK]
    key = _rising(tl.load(p_scores, mask=there, other=-float("inf")))  # [BLOCK]
    low = tl.min(tl.where(real, key, 0x7FFFFFFF), 0)
    key = tl.where(real, key, -0x80000000)  # [BLOCK]; below -inf
    high = tl.max(key, 0)
    count = tl.minimum(k, tl.sum(real.to(tl.int32), 0))

    # The largest number with `count` keys at or above it, or an earlier number with exactly `count`.
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up, without overflow
        reached = tl.sum((key >= middle).to(tl.int32), 0)
        low = tl.where(reached >= count, middle, low)
        high = tl.where(reached > count, high, tl.where(reached == count, middle, middle - 1))

    above = key > low  # [BLOCK]
    equal = real & (key == low)  # [BLOCK]
    ahead = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)  # [BLOCK]; two counts of 16 bits, one scan
    rank = (ahead >> 16) & 0xFFFF  # [BLOCK]; among equals, from 1
    ties = count - tl.sum(above.to(tl.int32), 0)
    place = (ahead & 0xFFFF) + tl.minimum(rank, ties) - 1  # [BLOCK]
    i_out = i_list * tl.num_programs(0) + i_part
    tl.store(pages + i_out * k + place, page, mask=above | (equal & (rank <= ties)))
    tl.store(pages + i_out * k + offs, tl.zeros([BLOCK], tl.int32) + fill, mask=(offs >= count) & (offs < k))
    tl.store(counts + i_out, count)
