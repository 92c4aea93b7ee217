"""Triton kernels of the lists of pages.

A program chooses from a short list, which it holds in registers. It searches for the smallest chosen score, over the
scores' bits as numbers of the same order, until exactly k scores are at or above it or the bits are exhausted. Then it
writes the chosen pages in order.

A long list is filtered first, by several programs; see `filter.py`. One program chooses among the candidates. If they
are too few or too many, it bisects over the whole list, which is slower and no less exact.
"""

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import launch_op
from sparse_patch.kernels.pieces import rising
from sparse_patch.ops.selection.top_pages.triton.filter import capacity_of, filter_pages
from sparse_patch.ops.selection.top_pages.triton.search import LEAST, floor_of, halfway, keys_of, pages_of_list

_SHORT = 4096  # pages of a list that is not filtered
_WIDEST = 32768  # pages that a program can hold
_PER_WARP = 512  # pages


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
    capacity, whole = min(_WIDEST, capacity_of(size, k)), max(32, triton.next_power_of_2(size))
    if size <= _SHORT or (2 * capacity >= whole and whole <= _WIDEST):
        _select_kernel[(batch * lists,)](*of_lists, pages, counts, BLOCK=whole, num_warps=_warps(whole))
        return pages, counts
    kept = filter_pages(scores, limits, k, page_size, spared, first, last, capacity)
    _narrow_kernel[(batch * lists,)](
        *of_lists,
        kept.scores,
        kept.pages,
        kept.found,
        kept.room,
        pages,
        counts,
        PARTS=kept.parts,
        BLOCK=capacity,
        num_warps=_warps(capacity),
    )
    return pages, counts


def _warps(block: int) -> int:
    return min(max(block // _PER_WARP, 1), 32)


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
def _choose(p_pages, page, key, number, count):
    """Write the `count` pages with the highest keys of a tile that has about `number` pages."""
    floor = floor_of(key, number, count, count)
    _write(p_pages, page, key, floor, count - tl.sum((key > floor).to(tl.int32), 0), 0, 0)


@triton.jit
def _finish(p_pages, counts, i_list, count, k, BLOCK: tl.constexpr):
    """Write the count of a list, and 0 after its pages."""
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    tl.store(p_pages + offs, tl.zeros([BLOCK], tl.int32), mask=(offs >= count) & (offs < k))
    tl.store(counts + i_list, count)


@jit(["k", "spared", "first", "last"])
def _select_kernel(
    scores, limits, score_strides, limit_strides, lists, size, k, page_size, spared, first, last, pages, counts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_list = tl.program_id(0).to(tl.int64)
    i_b, i_l = i_list // lists, i_list % lists
    stride_b, stride_l, stride_n = score_strides
    real = pages_of_list(limits, limit_strides, i_b, i_l, size, page_size, spared)
    count = tl.minimum(k, real)
    page = tl.arange(0, BLOCK)  # [BLOCK]
    p_scores = scores + i_b * stride_b + i_l * stride_l
    key = keys_of(p_scores, stride_n, page, page < size, real, first, last)  # [BLOCK]
    _choose(pages + i_list * k, page, key, real, count)
    _finish(pages + i_list * k, counts, i_list, count, k, BLOCK)


@jit(["k", "spared", "first", "last", "room"])
def _narrow_kernel(
    scores, limits, score_strides, limit_strides, lists, size, k, page_size, spared, first, last,
    kept, candidates, found, room, pages, counts, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_list = tl.program_id(0).to(tl.int64)
    i_b, i_l = i_list // lists, i_list % lists
    stride_b, stride_l, stride_n = score_strides
    real = pages_of_list(limits, limit_strides, i_b, i_l, size, page_size, spared)
    count = tl.minimum(k, real)
    p_pages = pages + i_list * k
    offs = tl.arange(0, BLOCK)  # [BLOCK]

    # 1. Where the candidates lie: those of each part at its beginning.
    reach = 0
    source = offs  # [BLOCK]
    for p in tl.static_range(PARTS):
        source = tl.where(offs >= reach, p * room + offs - reach, source)  # [BLOCK]
        reach += tl.load(found + (i_list * PARTS + p) * 2)

    if (reach >= count) & (reach <= BLOCK):
        # 2. The best of the candidates.
        p_kept = i_list * (PARTS * room)
        score = tl.load(kept + p_kept + source, mask=offs < reach, other=0.0)  # [BLOCK]
        key = tl.where(offs < reach, rising(score), LEAST)  # [BLOCK]
        page = tl.load(candidates + p_kept + source, mask=offs < reach, other=0)  # [BLOCK]
        _choose(p_pages, page, key, reach, count)
    else:
        # 3. The best of all pages.
        p_scores = scores + i_b * stride_b + i_l * stride_l
        low, high = tl.full([], LEAST + 1, dtype=tl.int32), tl.full([], 0x7FFFFFFF, dtype=tl.int32)
        while low < high:
            middle = halfway(low, high)
            reached = 0
            for i in tl.range(0, real, BLOCK):
                key = keys_of(p_scores, stride_n, i + offs, i + offs < size, real, first, last)  # [BLOCK]
                reached += tl.sum((key >= middle).to(tl.int32), 0)
            low = tl.where(reached >= count, middle, low)
            high = tl.where(reached > count, high, tl.where(reached == count, middle, middle - 1))
        larger = 0
        for i in tl.range(0, real, BLOCK):
            key = keys_of(p_scores, stride_n, i + offs, i + offs < size, real, first, last)  # [BLOCK]
            larger += tl.sum((key > low).to(tl.int32), 0)
        above, equal = 0, 0
        for i in tl.range(0, real, BLOCK):
            key = keys_of(p_scores, stride_n, i + offs, i + offs < size, real, first, last)  # [BLOCK]
            above, equal = _write(p_pages, i + offs, key, low, count - larger, above, equal)
    _finish(p_pages, counts, i_list, count, k, BLOCK)
