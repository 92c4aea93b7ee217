"""Triton kernels of the lists of pages.

A program chooses from a short list, which it holds in registers. It bisects for the smallest chosen score, over the
scores' bits as numbers of the same order, until exactly k scores are at or above it or the bits are exhausted. Then it
writes the chosen pages in order.

A long list is filtered first, by several programs. They draw the same sample of the list and take a score from it that
a few more than k pages of the list reach, most likely. The pages that reach it are candidates, and one program chooses
among them. It counts the candidates before. If they are too few or too many, it reads the whole list in every step,
which is slower and no less exact. If many pages have exactly the sample's score and it is the smallest chosen one, the
counts show this and nothing is searched.
"""

import math

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.launch import launch_op
from sparse_patch.kernels.pieces import rising

_SHORT = 4096  # pages of a list that is not filtered
_WIDEST = 32768  # pages that a program can hold
_SAMPLE = (512, 4096)  # fewest and most pages of a sample
_PART = 2048  # pages that a filtering program reads at once
_PARTS = 16  # most programs that filter a list
_PROGRAMS = 256  # filtering programs that are enough for a GPU
_MARGIN = 4.5  # standard deviations of the sample's count
_LEAST: tl.constexpr = tl.constexpr(-0x80000000)  # below the number of every score
_MOST: tl.constexpr = tl.constexpr(0x7FFFFFFF)


def why_unsupported(scores: torch.Tensor, k: int) -> str | None:
    """Why the kernels cannot choose k pages; None if they can."""
    size = scores.shape[-1]
    if k < 1 or (triton.next_power_of_2(size) > _WIDEST and 2 * k > _WIDEST):
        return f"the kernel does not choose {k} of {size} pages"
    return None


def top_pages(
    scores: torch.Tensor,
    limits: torch.Tensor,
    k: int,
    page_size: int = 1,
    spared: int = 0,
    first: int = 0,
    last: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.top_pages`; `limits` is int64 `[B, L]` and `k` at most N."""
    return select_pages(scores, limits, k, page_size, spared, first, last)


def _outputs(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch, lists, _ = scores.shape
    pages = torch.empty(batch, lists, k, dtype=torch.int32, device=scores.device)
    return pages, torch.empty(batch, lists, dtype=torch.int32, device=scores.device)


@launch_op("top_pages", _outputs)
def select_pages(
    scores: torch.Tensor, limits: torch.Tensor, k: int, page_size: int, spared: int, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels' launches; arguments and results as in `top_pages`."""
    pages, counts = _outputs(scores, k)
    batch, lists, size = scores.shape
    of_lists = scores, limits, scores.stride(), limits.stride(), lists, size, k, page_size, spared, first, last
    sample = _sample(size)
    capacity, whole = _capacity(size, k, sample), max(32, triton.next_power_of_2(size))
    if size <= _SHORT or (2 * capacity >= whole and whole <= _WIDEST):
        _select_kernel[(batch * lists,)](*of_lists, pages, counts, BLOCK=whole, num_warps=_warps(whole))
        return pages, counts
    parts = min(_PARTS, *map(triton.next_power_of_2, (triton.cdiv(_PROGRAMS, batch * lists), triton.cdiv(size, _PART))))
    steps = triton.cdiv(size, parts * _PART)
    candidates = torch.empty(batch * lists, parts * steps * _PART, dtype=torch.int32, device=scores.device)
    found = torch.empty(batch * lists, parts, 4, dtype=torch.int32, device=scores.device)
    _filter_kernel[(parts, batch * lists)](
        *of_lists, candidates, found, steps, capacity, _MARGIN, SAMPLE=sample, BLOCK=_PART, num_warps=8
    )
    _narrow_kernel[(batch * lists,)](
        *of_lists,
        candidates,
        found,
        parts,
        steps * _PART,
        pages,
        counts,
        PARTS=_PARTS,
        BLOCK=capacity,
        num_warps=_warps(capacity),
    )
    return pages, counts


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 32)


def _sample(size: int) -> int:
    """Pages of a sample of `size` pages."""
    least, most = _SAMPLE
    return min(most, max(least, triton.next_power_of_2(size // 16)))


def _capacity(size: int, k: int, sample: int) -> int:
    """Candidates that a program has room for: five standard deviations more than are expected."""
    of_sample = k * sample / size
    reach = of_sample + _MARGIN * math.sqrt(of_sample) + 2  # pages of the sample that reach its score
    reach += reach / 8 + 5 * math.sqrt(reach)
    return min(_WIDEST, triton.next_power_of_2(max(32, k, math.ceil(reach * size / sample))))


@triton.jit
def _pages_of_list(limits, limit_strides, i_b, i_l, size, page_size, spared):
    """The number of real pages of a list."""
    stride_b, stride_l = limit_strides
    limit = tl.load(limits + i_b * stride_b + i_l * stride_l) - spared
    return tl.minimum(tl.maximum(tl.cdiv(limit, page_size), 0), size).to(tl.int32)


@triton.jit
def _keys(p_scores, stride_n, page, there, real, first, last):
    """The scores of pages as `rising` numbers; `_LEAST` for a page that is not real.

    The first and the last pages have +inf. Pages that are `there` can be read; a mask that may end anywhere forbids
    wide loads, so it has more than the real pages.
    """
    score = tl.load(p_scores + page.to(tl.int64) * stride_n, mask=there, other=-float("inf"))
    score = tl.where((page < first) | (page >= real - last), float("inf"), score)
    return tl.where(there & (page < real), rising(score), _LEAST)


@triton.jit
def _middle(low, high):
    """The mean of two numbers, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def _floor(key, low, high, fewest, most):
    """A number that `fewest` to `most` keys reach, if the bits allow it, else the largest that `fewest` reach."""
    while low < high:
        middle = _middle(low, high)
        reached = tl.sum((key >= middle).to(tl.int32), 0)
        low = tl.where(reached >= fewest, middle, low)
        high = tl.where(reached > most, high, tl.where(reached >= fewest, middle, middle - 1))
    return low


@triton.jit
def _write(p_pages, page, key, floor, ties, above_before, equal_before):
    """Write the pages of a tile that are chosen; gives the numbers of keys above the floor and at it so far."""
    above = key > floor
    equal = key == floor
    ahead = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)  # two counts of 16 bits, one scan
    rank = equal_before + ((ahead >> 16) & 0xFFFF)  # among equals, from 1
    place = above_before + (ahead & 0xFFFF) + tl.minimum(rank, ties) - 1
    tl.store(p_pages + place, page, mask=above | (equal & (rank <= ties)))
    return above_before + tl.sum(above.to(tl.int32), 0), equal_before + tl.sum(equal.to(tl.int32), 0)


@triton.jit
def _choose(p_pages, page, key, count):
    """Write the `count` pages with the highest keys of a tile."""
    low = tl.min(tl.where(key != _LEAST, key, _MOST), 0)
    floor = _floor(key, low, tl.max(key, 0), count, count)
    _write(p_pages, page, key, floor, count - tl.sum((key > floor).to(tl.int32), 0), 0, 0)


@triton.jit
def _finish(p_pages, counts, i_list, count, k, BLOCK: tl.constexpr):
    """Write the count of a list, and 0 after its pages."""
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    tl.store(p_pages + offs, tl.zeros([BLOCK], tl.int32), mask=(offs >= count) & (offs < k))
    tl.store(counts + i_list, count)


@triton.jit(do_not_specialize=["k", "spared", "first", "last"])
def _select_kernel(
    scores, limits, score_strides, limit_strides, lists, size, k, page_size, spared, first, last, pages, counts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_list = tl.program_id(0).to(tl.int64)
    i_b, i_l = i_list // lists, i_list % lists
    stride_b, stride_l, stride_n = score_strides
    real = _pages_of_list(limits, limit_strides, i_b, i_l, size, page_size, spared)
    count = tl.minimum(k, real)
    page = tl.arange(0, BLOCK)  # [BLOCK]
    p_scores = scores + i_b * stride_b + i_l * stride_l
    key = _keys(p_scores, stride_n, page, page < size, real, first, last)  # [BLOCK]
    _choose(pages + i_list * k, page, key, count)
    _finish(pages + i_list * k, counts, i_list, count, k, BLOCK)


@triton.jit(do_not_specialize=["k", "spared", "first", "last", "steps", "capacity"])
def _filter_kernel(
    scores, limits, score_strides, limit_strides, lists, size, k, page_size, spared, first, last,
    candidates, found, steps, capacity, margin, SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_part, i_list = tl.program_id(0), tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(0)
    i_b, i_l = i_list // lists, i_list % lists
    stride_b, stride_l, stride_n = score_strides
    real = _pages_of_list(limits, limit_strides, i_b, i_l, size, page_size, spared)
    p_scores = scores + i_b * stride_b + i_l * stride_l
    begin = i_part * steps * BLOCK
    end = tl.minimum(begin + steps * BLOCK, real)

    # 1. A score that more than k pages reach, most likely.
    floor = tl.full([], _LEAST, dtype=tl.int32)
    if (real > capacity) & (begin < end):
        j = tl.arange(0, SAMPLE)  # [SAMPLE]
        within = (j * 40503) & 0xFFFF  # [SAMPLE]; one page from each stretch, at no regular distance
        sampled = (((j.to(tl.int64) << 16) + within) * real // (SAMPLE * 65536)).to(tl.int32)  # [SAMPLE]
        key = _keys(p_scores, stride_n, sampled, sampled < real, real, first, last)  # [SAMPLE]
        of_sample = SAMPLE * (tl.minimum(k, real).to(tl.float32) / real.to(tl.float32))
        wanted = (of_sample + margin * tl.sqrt(of_sample) + 2.0).to(tl.int32)
        if wanted < SAMPLE:
            floor = _floor(key, tl.min(key, 0), tl.max(key, 0), wanted, wanted + wanted // 8)

    # 2. The pages that reach it.
    p_candidates = candidates + i_list * (parts * steps * BLOCK) + begin
    reach, above = 0, 0
    for i in tl.range(begin, end, BLOCK):
        page = i + tl.arange(0, BLOCK)  # [BLOCK]
        key = _keys(p_scores, stride_n, page, page < size, real, first, last)  # [BLOCK]
        reaches = ((key >= floor) & (key != _LEAST)).to(tl.int32)  # [BLOCK]
        tl.store(p_candidates + reach + tl.cumsum(reaches, 0) - 1, page, mask=reaches != 0)
        reach += tl.sum(reaches, 0)
        above += tl.sum((key > floor).to(tl.int32), 0)
    p_found = found + (i_list * parts + i_part) * 4
    tl.store(p_found, reach)
    tl.store(p_found + 1, above)
    tl.store(p_found + 2, floor)


@triton.jit(do_not_specialize=["k", "spared", "first", "last", "parts", "per_part"])
def _narrow_kernel(
    scores, limits, score_strides, limit_strides, lists, size, k, page_size, spared, first, last,
    candidates, found, parts, per_part, pages, counts, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_list = tl.program_id(0).to(tl.int64)
    i_b, i_l = i_list // lists, i_list % lists
    stride_b, stride_l, stride_n = score_strides
    real = _pages_of_list(limits, limit_strides, i_b, i_l, size, page_size, spared)
    count = tl.minimum(k, real)
    p_scores = scores + i_b * stride_b + i_l * stride_l
    p_pages = pages + i_list * k
    offs = tl.arange(0, BLOCK)  # [BLOCK]

    # 1. Where the candidates lie: those of each part at its beginning.
    reach, above = 0, 0
    source = offs  # [BLOCK]
    for p in tl.static_range(PARTS):
        p_found = found + (i_list * parts + p) * 4
        source = tl.where(offs >= reach, p * per_part + offs - reach, source)  # [BLOCK]
        reach += tl.load(p_found, mask=p < parts, other=0)
        above += tl.load(p_found + 1, mask=p < parts, other=0)

    if (reach >= count) & (reach <= BLOCK):
        # 2. The best of the candidates.
        p_candidates = candidates + i_list * (parts * per_part) + source  # [BLOCK]
        page = tl.load(p_candidates, mask=offs < reach, other=0)  # [BLOCK]
        key = _keys(p_scores, stride_n, page, offs < reach, real, first, last)  # [BLOCK]
        _choose(p_pages, page, key, count)
    else:
        # 3. The best of all pages. The counts say on which side of the sample's score the smallest chosen one lies.
        sampled = tl.load(found + i_list * parts * 4 + 2)
        low = tl.where(reach >= count, tl.maximum(sampled, _LEAST + 1), _LEAST + 1)
        high = tl.where(above >= count, _MOST, sampled)
        while low < high:
            middle = _middle(low, high)
            reached = 0
            for i in tl.range(0, real, BLOCK):
                key = _keys(p_scores, stride_n, i + offs, i + offs < size, real, first, last)  # [BLOCK]
                reached += tl.sum((key >= middle).to(tl.int32), 0)
            low = tl.where(reached >= count, middle, low)
            high = tl.where(reached > count, high, tl.where(reached == count, middle, middle - 1))
        larger = 0
        for i in tl.range(0, real, BLOCK):
            key = _keys(p_scores, stride_n, i + offs, i + offs < size, real, first, last)  # [BLOCK]
            larger += tl.sum((key > low).to(tl.int32), 0)
        above, equal = 0, 0
        for i in tl.range(0, real, BLOCK):
            key = _keys(p_scores, stride_n, i + offs, i + offs < size, real, first, last)  # [BLOCK]
            above, equal = _write(p_pages, i + offs, key, low, count - larger, above, equal)
    _finish(p_pages, counts, i_list, count, k, BLOCK)
