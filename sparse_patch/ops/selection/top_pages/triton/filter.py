"""Triton kernel that filters long lists of pages, by several programs a list.

The programs of a list draw the same sample of it and take a score from it that a few more than k pages of the list
reach, most likely. The pages that reach it are candidates. If too many of the sample have exactly this score, only the
first of them are. Candidates can be divided into two tiers: those of the first one have higher scores.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.ops.selection.top_pages.triton.search import (
    LEAST,
    bisect,
    floor_of,
    keys_of,
    pages_of_list,
    score_of,
    scores_of,
)

_SAMPLE = (512, 4096)  # fewest and most pages of a sample
_SHARE = 16  # pages of a list for each page of its sample, if the sample may have so many
_PART = (512, 4096)  # fewest and most pages that a program reads at once
_PARTS = 16  # most programs that filter a list
_PROGRAMS = 256  # programs that are enough for a GPU, which runs them all at once with few enough registers
_WARPS, _REGISTERS = 8, 128  # of a program and of its threads, at most
_MARGIN = 4.5  # standard deviations of the sample's count


@dataclass(frozen=True)
class Candidates:
    """The candidates of lists: those of a part's first tier from its beginning on, of the second from its end back.

    Attributes:
        scores: float32 `[lists, parts * room]`; no NaN.
        pages: int32, of the same shape.
        found: int32 `[lists, parts, 2]`: candidates in the tiers of a part.
        parts: parts of a list.
        room: pages of a part.
    """

    scores: torch.Tensor
    pages: torch.Tensor
    found: torch.Tensor
    parts: int
    room: int


def sample_of(size: int) -> int:
    """Pages of a sample of `size` pages."""
    least, most = _SAMPLE
    return min(most, max(least, triton.next_power_of_2(size // _SHARE)))


def capacity_of(size: int, k: int) -> int:
    """Candidates that a program has room for; hardly ever there are more."""
    sample = sample_of(size)
    of_sample = k * sample / size
    reach = of_sample + _MARGIN * math.sqrt(of_sample) + 2  # pages of the sample that reach its score
    reach += reach / 16 + _MARGIN * math.sqrt(reach)
    return triton.next_power_of_2(max(32, k, math.ceil(reach * size / sample)))


def filter_pages(
    scores: torch.Tensor,
    limits: torch.Tensor,
    k: int,
    page_size: int,
    spared: int,
    first: int,
    last: int,
    fits: int,
    upper: int = 0,
    zeros: torch.Tensor | None = None,
) -> Candidates:
    """The candidates of `top_pages`; arguments as there.

    Args:
        fits: the pages of a list that has at most so many are candidates.
        upper: about how many pages of a list the first tier has, if there are two.
        zeros: float32 `[B * N + B]`, is filled with zeros; if it is given, there are two tiers.
    """
    batch, lists, size = scores.shape
    least, most = _PART
    parts = min(_PARTS, max(_PROGRAMS // (batch * lists), 1))
    parts = 1 << (parts.bit_length() - 1)  # so there are few variants of the kernels
    block = min(most, max(least, triton.next_power_of_2(triton.cdiv(size, parts))))
    steps = triton.cdiv(size, parts * block)
    kept = scores.new_empty(batch * lists, parts * steps * block)
    pages = torch.empty_like(kept, dtype=torch.int32)
    found = torch.empty(batch * lists, parts, 2, dtype=torch.int32, device=scores.device)
    filter_kernel[(parts, batch * lists)](
        scores,
        limits,
        scores.stride(),
        limits.stride(),
        lists,
        size,
        k,
        page_size,
        spared,
        first,
        last,
        kept,
        pages,
        found,
        scores if zeros is None else zeros,
        steps,
        fits,
        upper,
        _MARGIN,
        SAMPLE=sample_of(size),
        BLOCK=block,
        TIERS=1 if zeros is None else 2,
        num_warps=max(1, min(_WARPS, block // 256)),
        maxnreg=_REGISTERS,
    )
    return Candidates(kept, pages, found, parts, steps * block)


@triton.jit
def _sampled_floor(p_scores, stride_n, real, first, last, k, upper, margin, SAMPLE: tl.constexpr, TIERS: tl.constexpr):
    """A score that more than k pages reach, most likely; the last page that may have exactly this score; and a score
    that about `upper` pages reach, if scores fall off exponentially."""
    j = tl.arange(0, SAMPLE)  # [SAMPLE]
    within = (j * 40503) & 0xFFFF  # [SAMPLE]; one page from each stretch, at no regular distance
    page = (((j.to(tl.int64) << 16) + within) * real // (SAMPLE * 65536)).to(tl.int32)  # [SAMPLE]
    key = keys_of(p_scores, stride_n, page, page < real, real, first, last)  # [SAMPLE]
    each = SAMPLE / real.to(tl.float32)
    of_sample = each * tl.minimum(k, real).to(tl.float32)
    wanted = (of_sample + margin * tl.sqrt(of_sample) + 2.0).to(tl.int32)
    most = wanted + wanted // 16
    floor, until, high = -float("inf"), real, -float("inf")
    if wanted < SAMPLE:
        least = floor_of(key, tl.full([], SAMPLE, dtype=tl.int32), wanted, most)
        reached = tl.sum((key >= least).to(tl.int32), 0)
        floor = score_of(least)
        high = floor
        if reached > most:
            falling = tl.where(key > least, 1, tl.where(key == least, -page, LEAST))  # [SAMPLE]
            until = -bisect(falling, -real, tl.full([], 0, dtype=tl.int32), wanted, most)
        if TIERS > 1:
            over = tl.sum(tl.where(key > least, score_of(key) - floor, 0.0), 0) / reached
            high = floor + over * tl.maximum(tl.log(reached / (each * upper)), 0.0)
    return floor, until, high


@jit(["k", "spared", "first", "last", "steps", "fits", "upper"])
def filter_kernel(
    scores, limits, score_strides, limit_strides, lists, size, k, page_size, spared, first, last,
    kept, pages, found, zeros, steps, fits, upper, margin,
    SAMPLE: tl.constexpr, BLOCK: tl.constexpr, TIERS: tl.constexpr,
):  # fmt: skip
    i_part, i_list = tl.program_id(0), tl.program_id(1).to(tl.int64)
    parts = tl.num_programs(0)
    i_b, i_l = i_list // lists, i_list % lists
    stride_b, stride_l, stride_n = score_strides
    real = pages_of_list(limits, limit_strides, i_b, i_l, size, page_size, spared)
    p_scores = scores + i_b * stride_b + i_l * stride_l
    room = steps * BLOCK
    begin = i_part * room
    end = tl.minimum(begin + room, real)
    offs = tl.arange(0, BLOCK)  # [BLOCK]
    here = begin + offs  # [BLOCK]
    loaded = scores_of(p_scores, stride_n, here, here < size, real, first, last)  # [BLOCK]; arrives during the search

    # 1. Which pages are candidates.
    floor, until, high = -float("inf"), real, -float("inf")
    if (real > fits) & (begin < end):
        floor, until, high = _sampled_floor(p_scores, stride_n, real, first, last, k, upper, margin, SAMPLE, TIERS)

    # 2. Where they lie: two counts of 16 bits in one scan.
    p_kept = kept + i_list * (parts * room) + begin
    p_pages = pages + i_list * (parts * room) + begin
    in_first, in_second = 0, 0
    for i in tl.range(begin, end, BLOCK):
        score = loaded  # [BLOCK]
        page = i + offs  # [BLOCK]
        there = page + BLOCK < tl.where(i + BLOCK < end, size, 0)  # [BLOCK]
        loaded = scores_of(p_scores, stride_n, page + BLOCK, there, real, first, last)  # [BLOCK]
        reaches = (score > floor) | ((score == floor) & (page <= until))  # [BLOCK]
        reaches &= page < end  # [BLOCK]
        ones = reaches.to(tl.int32)  # [BLOCK]
        if TIERS > 1:
            ones = ones << tl.where(score >= high, 0, 16)  # [BLOCK]
        ahead = tl.cumsum(ones, 0)  # [BLOCK]
        place = in_first + (ahead & 0xFFFF) - 1  # [BLOCK]
        if TIERS > 1:
            place = tl.where(score >= high, place, room - in_second - (ahead >> 16))  # [BLOCK]
        tl.store(p_kept + place, score, mask=reaches)
        tl.store(p_pages + place, page, mask=reaches)
        number = tl.sum(ones, 0)
        in_first += number & 0xFFFF
        in_second += number >> 16
    p_found = found + (i_list * parts + i_part) * 2
    tl.store(p_found, in_first)
    tl.store(p_found + 1, in_second)

    # 3. Zeros.
    if TIERS > 1:
        for i in tl.range(begin, tl.where(i_l == 0, tl.minimum(begin + room, size), begin), BLOCK):
            tl.store(zeros + i_b * size + i + offs, tl.zeros([BLOCK], tl.float32), mask=i + offs < size)
        rows = tl.num_programs(1) // lists
        tl.store(zeros + tl.cast(rows, tl.int64) * size + i_b, 0.0, mask=(i_l == 0) & (i_part == 0))
