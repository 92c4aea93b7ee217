"""Triton kernels of the merge of rankings.

The heads' lists are filtered, in two tiers, as for `top_pages`. A program ranks some of a tier's candidates: it counts
those that come before each of them. Nothing is sorted. The upper tiers are usually enough to fill the list, and the
others are ranked only if they are not. If a head has too few candidates, all its tokens are ranked, which is slower and
no less exact.

The best place of a token is a maximum over heads, which does not depend on their order, so it is an atomic one. Scores
are not negative, so it is a maximum of their bits.

The list takes tokens place by place. So programs that write parts of it go through the places, and count the tokens
that have their best place there, until the list is full.
"""

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import launch_op
from sparse_patch.kernels.pieces import rising
from sparse_patch.ops.selection.top_pages.triton.filter import filter_pages
from sparse_patch.ops.selection.top_pages.triton.search import LEAST, keys_of, pages_of_list

_BLOCK_M, _BLOCK_N = 128, 256  # tokens that a program ranks, and those that it compares them with at once
_WARPS = 4  # of a program that ranks
_DEPTH = 12  # tokens in the upper tiers of all heads for each token of the list
_PLACES = 2048  # places that a program looks at at once
_PART = 1024  # tokens of a part of the list
_CUT_WARPS = 8  # of a program that writes one


def _outputs(scores: torch.Tensor) -> torch.Tensor:
    return scores.new_empty(scores.shape[0], scores.shape[-1])


@launch_op("merge_ranks", _outputs)
def merge(scores: torch.Tensor, limits: torch.Tensor, k: int, spared: int, first_head: int, heads: int) -> torch.Tensor:
    """See `ops.selection.rank_merge.torch.merge`."""
    return _ranked(scores, limits, k, spared, first_head, heads, 0, None)[0] if scores.numel() else _outputs(scores)


def _lists(scores: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    pages = torch.empty(scores.shape[0], 1, min(most, scores.shape[-1]), dtype=torch.int32, device=scores.device)
    return pages, torch.empty(scores.shape[0], 1, dtype=torch.int32, device=scores.device)


@launch_op("merged_list", _lists)
def merged_list(
    scores: torch.Tensor, limits: torch.Tensor, most: int, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.rank_merge.merged_list`."""
    pages, counts = _lists(scores, most)
    batch, heads, size = scores.shape
    if not pages.numel():
        return pages, counts.zero_()
    merged, order = _ranked(scores, limits, most - last, last, 0, heads, first, most - first - last)
    _cut_kernel[(triton.cdiv(size, _PART), batch)](
        limits,
        merged,
        order,
        pages,
        counts,
        limits.stride(0),
        size,
        order.shape[1],
        most,
        first,
        last,
        PLACES=_PLACES,
        BLOCK=_PART,
        num_warps=_CUT_WARPS,
    )
    return pages, counts


def _ranked(
    scores: torch.Tensor,
    limits: torch.Tensor,
    k: int,
    spared: int,
    first_head: int,
    heads: int,
    first: int,
    wanted: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best places of tokens, and the tokens at the places.

    Args:
        first: first tokens, which do not count as wanted.
        wanted: how many tokens are asked for, which need not be all that are ranked; None to rank k of each head.

    Returns:
        The scores of `merge`, float32 `[B, N]`, and tokens, int32 `[B, k * heads]`, of which only those count that have
        the place's score.
    """
    batch, here, size = scores.shape
    merged = scores.new_empty(batch * size + batch)  # the scores, and then a count of tokens for each row
    order = torch.empty(batch, k * heads, dtype=torch.int32, device=scores.device)
    limits = limits[:, None].expand(batch, here)
    upper = k - k // 4 if wanted is None else min(k, triton.cdiv(_DEPTH * wanted, here))
    kept = filter_pages(scores, limits, k, 1, spared, 0, 0, upper, upper, merged)
    for tier, number in enumerate((upper, k + k // 2 - upper)):  # roughly
        _rank_kernel[(max(1, triton.cdiv(5 * number, 4 * _BLOCK_M)), batch * here)](
            scores,
            limits,
            scores.stride(),
            limits.stride(),
            here,
            size,
            k,
            spared,
            kept.scores,
            kept.pages,
            kept.found,
            kept.room,
            merged.view(torch.int32),
            order,
            first_head,
            heads,
            first,
            k * heads if wanted is None else wanted,
            TIER=tier,
            HEADS=triton.next_power_of_2(here),
            PARTS=kept.parts,
            BLOCK_M=_BLOCK_M,
            BLOCK_N=_BLOCK_N,
            num_warps=_WARPS,
        )
    return merged[: batch * size].view(batch, size), order


@triton.jit
def _in_tier(found, i_list, tier, PARTS: tl.constexpr):
    """How many candidates of a list are in a tier."""
    number = 0
    for p in tl.static_range(PARTS):
        number += tl.load(found + (i_list * PARTS + p) * 2 + tier)
    return number


@triton.jit
def _members(
    p_scores, stride_n, real, candidates, tokens, found, i_list, room, offs, number, whole,
    TIER: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The `rising` scores of members of a tier, `LEAST` after the last one, and their tokens."""
    reach = 0
    source = offs  # [BLOCK]
    for p in tl.static_range(PARTS):
        inside = offs - reach  # [BLOCK]; of the part
        source = tl.where(inside >= 0, p * room + (inside if TIER == 0 else room - 1 - inside), source)  # [BLOCK]
        reach += tl.load(found + (i_list * PARTS + p) * 2 + TIER)
    kept = offs < tl.where(whole, 0, number)  # [BLOCK]
    p_kept = i_list * (PARTS * room)
    key = tl.where(kept, rising(tl.load(candidates + p_kept + source, mask=kept, other=0.0)), LEAST)  # [BLOCK]
    token = tl.load(tokens + p_kept + source, mask=kept, other=0)  # [BLOCK]
    if whole:
        key = keys_of(p_scores, stride_n, offs, offs < number, real, 0, 0)  # [BLOCK]
        token = offs  # [BLOCK]
    return key, token


@jit(["size", "k", "spared", "room", "first_head", "heads", "first", "wanted"])
def _rank_kernel(
    scores, limits, score_strides, limit_strides, here, size, k, spared, candidates, tokens, found, room, merged, order,
    first_head, heads, first, wanted,
    TIER: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    i_m, i_list = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_h = i_list // here, i_list % here
    stride_b, stride_h, stride_n = score_strides
    real = pages_of_list(limits, limit_strides, i_b, i_h, size, 1, spared)
    p_scores = scores + i_b * stride_b + i_h * stride_h
    p_merged = merged + i_b * size
    p_seen = merged + tl.cast(tl.num_programs(1) // here, tl.int64) * size + i_b
    best = k * heads
    if TIER == 1:
        if tl.load(p_seen) >= wanted:
            return

    # 1. How many tokens are in the tier, and above it.
    number, above = _in_tier(found, i_list, 0, PARTS), 0
    other = _in_tier(found, i_list, 1, PARTS)
    whole = number + other < tl.minimum(k, real)
    if TIER == 0:
        number = tl.where(whole, real, number)
        # Tokens with places up to this score will have their best place, whatever is ranked later.
        offs_h = tl.arange(0, HEADS)  # [HEADS]
        p_found = found + (i_b * here + tl.minimum(offs_h, here - 1)) * (PARTS * 2)  # [HEADS]
        complete = tl.zeros([HEADS], tl.int32)  # [HEADS]
        every = tl.zeros([HEADS], tl.int32)  # [HEADS]
        for p in tl.static_range(PARTS):
            complete += tl.load(p_found + p * 2)  # [HEADS]
            every += tl.load(p_found + p * 2) + tl.load(p_found + p * 2 + 1)  # [HEADS]
        complete = tl.where(every < tl.minimum(k, real), real, complete)  # [HEADS]
        certain = best - tl.minimum(tl.min(complete, 0), k) * heads
    else:
        above = number
        number = tl.where(whole | (above >= k), 0, other)

    # 2. The ranks of some of them.
    for m in tl.range(i_m * BLOCK_M, number, tl.num_programs(0) * BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)  # [BM]
        key, token = _members(
            p_scores, stride_n, real, candidates, tokens, found, i_list, room, offs_m, number, whole, TIER, PARTS
        )  # [BM]
        # Tokens with a higher score come before, and those with the same score that are listed before.
        equal = (key[:, None] == key[None, :]) & (offs_m[:, None] < offs_m[None, :])  # [BM, BM]
        rank = above + tl.sum(equal.to(tl.int32), 0)  # [BM]
        for n in tl.range(0, number, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)  # [BN]
            other_key, _ = _members(
                p_scores, stride_n, real, candidates, tokens, found, i_list, room, offs_n, number, whole, TIER, PARTS
            )  # [BN]
            other_key += (offs_n < m).to(tl.int32)  # [BN]; one more wins a tie
            rank += tl.sum((other_key[:, None] > key[None, :]).to(tl.int32), 0)  # [BM]; a thread sums most of it
        ranked = (offs_m < number) & (rank < k)  # [BM]
        place = rank * heads + first_head + i_h.to(tl.int32)  # [BM]
        tl.store(order + i_b * best + place, token, mask=ranked)
        score = (best - place).to(tl.float32).to(tl.int32, bitcast=True)  # [BM]
        before = tl.atomic_max(p_merged + token, score, mask=ranked, sem="relaxed")  # [BM]
        if TIER == 0:
            line = certain.to(tl.float32).to(tl.int32, bitcast=True)
            new = ranked & (before <= line) & (score > line) & (token >= first)  # [BM]
            tl.atomic_add(p_seen, tl.sum(new.to(tl.int32), 0), sem="relaxed")


@jit(["size", "best", "most", "first", "last"])
def _cut_kernel(
    limits, merged, order, pages, counts, stride_limit, size, best, most, first, last,
    PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin = i_t * BLOCK
    offs = begin + tl.arange(0, BLOCK)  # [BLOCK]
    p_merged = merged + i_b * size
    score = tl.load(p_merged + offs, mask=offs < size, other=0.0)  # [BLOCK]
    length = tl.minimum(tl.load(limits + i_b * stride_limit), size).to(tl.int32)
    end = length - last  # of the tokens that have ranks
    every = length <= most

    # 1. The last place of which the token is listed, and how many listed tokens are before this part.
    missing = tl.where(every, 0, most - first - last)
    cut = tl.where(every, 0.0, float("inf"))
    before = tl.minimum(begin, first) + tl.maximum(begin - end, 0)
    place = 0
    while (missing > 0) & (place < best):
        offs_p = place + tl.arange(0, PLACES)  # [PLACES]
        token = tl.load(order + i_b * best + offs_p, mask=offs_p < best, other=-1)  # [PLACES]
        # Some places have no token yet, but then nothing has their score.
        own = (best - offs_p).to(tl.float32)  # [PLACES]
        inside = (token >= first) & (token < end)  # [PLACES]
        new = inside & (tl.load(p_merged + token, mask=inside, other=-1.0) == own)  # [PLACES]
        new &= tl.cumsum(new.to(tl.int32), 0) <= missing  # [PLACES]
        before += tl.sum((new & (token < begin)).to(tl.int32), 0)
        cut = tl.min(tl.where(new, own, cut), 0)
        missing -= tl.sum(new.to(tl.int32), 0)
        place += PLACES

    # 2. This part of the list.
    listed = (offs < length) & ((offs < first) | (offs >= end) | (score >= cut))  # [BLOCK]
    before = tl.where(every, tl.minimum(begin, length), before)
    p_pages = pages + i_b * tl.minimum(most, size)
    tl.store(p_pages + before + tl.cumsum(listed.to(tl.int32), 0) - 1, offs, mask=listed)
    count = tl.minimum(length, most)
    tl.store(p_pages + offs, tl.zeros([BLOCK], tl.int32), mask=(offs >= count) & (offs < tl.minimum(most, size)))
    tl.store(counts + i_b, count, mask=i_t == 0)
