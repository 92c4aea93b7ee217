"""Triton kernels that choose blocks by their scores, and list them.

A program of the first kernel chooses for a token. It bisects for the smallest chosen score, over the scores' bits (no
score is negative, so the bits are numbers of the same order). The second kernel makes one list for a tile of tokens:
the blocks that any of the tokens chose, with the tokens that chose them.
"""

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.ops.selection.compressed_keys.params import BLOCK
from sparse_patch.ops.selection.compressed_keys.triton.part import Part, candidates
from sparse_patch.plans import BLOCK_BITS

_BITS: tl.constexpr = tl.constexpr(BLOCK_BITS)
_BLOCK: tl.constexpr = tl.constexpr(BLOCK)


def write_lists(
    entries: torch.Tensor,
    counts: torch.Tensor,
    scores: torch.Tensor,
    chosen_map: torch.Tensor,
    seen: int,
    chosen: int,
    tile: int,
    part: Part,
) -> None:
    """Write the lists of a part, from its scores.

    Args:
        entries: int32 `[B, Hkv, tiles, capacity]` of a `TokenBlockPlan`; the lists of the part are written.
        counts: int32 `[B, Hkv, tiles]`, likewise.
        scores: as `write_scores` writes them.
        chosen_map: int8 `[n]`, is written: whether a block is chosen.
        seen: blocks that the last token of the longest row sees.
        chosen: blocks that each token chooses.
        tile: tokens per list.
        part: the part to write.
    """
    block = max(256, triton.next_power_of_2(seen))  # few variants to compile
    tokens = 1 if scores.is_cuda else tile  # per choosing program; in the interpreter, programs take time
    _choose_kernel[part.grid(tokens)](
        scores[0],
        scores[1],
        chosen_map,
        *part.place,
        part.heads,
        part.width,
        *part.always,
        chosen,
        TOKENS=tokens,
        BLOCK_B=block,
        HAS_START=part.has_start,
        num_warps=min(max(block // 1024, 1), 16),
    )
    _list_kernel[part.grid(tile)](
        chosen_map,
        entries,
        counts,
        *part.place,
        part.heads,
        part.width,
        *part.always,
        entries.shape[2],
        entries.shape[3],
        TILE=tile,
        BLOCK_B=block,
        HAS_START=part.has_start,
        num_warps=min(max(tile * block // 2048, 1), 16),
    )


@triton.jit
def _floor(key, count):
    """For each row a number with `count` keys at or above it, or with as few more as possible; keys are at least 0."""
    floor = tl.zeros([key.shape[0]], dtype=tl.int32)  # [T]
    ceiling = tl.max(key, 1)  # [T]
    while tl.max(ceiling - floor, 0) > 0:
        middle = floor + ((ceiling - floor + 1) >> 1)  # [T]
        reached = tl.sum((key >= middle[:, None]).to(tl.int32), 1)  # [T]
        floor = tl.where(reached >= count, middle, floor)  # [T]
        ceiling = tl.where(reached > count, ceiling, tl.where(reached == count, middle, middle - 1))  # [T]
    return floor


@jit(["q_start", "q_length", "first_block", "width", "init", "local", "dense"])
def _choose_kernel(
    highest,
    last,
    chosen,
    kv_start,
    q_start,
    q_length,
    first_block,
    kv_heads,
    width,
    init,
    local,
    dense,
    wanted,
    TOKENS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HAS_START: tl.constexpr,
):
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    start = 0
    if HAS_START:
        start = tl.load(kv_start + i_bh // kv_heads).to(tl.int32)
    first = (tl.maximum(q_start - start, 0) // _BLOCK + first_block) * _BLOCK + i_t * TOKENS  # within the row
    begin, low = candidates(first // _BLOCK, init, local, dense)
    inside = (first + start < q_start + q_length) & (first + TOKENS + start > q_start)
    if inside & (begin < low):
        offs_t = tl.arange(0, TOKENS)  # [TOKENS]
        offs_b = tl.arange(0, BLOCK_B)  # [BB]
        index = first + offs_t + start - q_start  # [TOKENS]
        real = (index >= tl.maximum(start - q_start, 0)) & (index < q_length)  # [TOKENS]
        candidate = ((offs_b >= begin) & (offs_b < low))[None, :]  # [1, BB]
        slot = i_bh.to(tl.int64) * (tl.num_programs(0) * TOKENS) + i_t * TOKENS + offs_t  # [TOKENS]
        row = (slot * width)[:, None]  # [TOKENS, 1]
        score = tl.load(highest + row + offs_b[None, :], mask=candidate, other=0.0)  # [TOKENS, BB]
        # [TOKENS, BB]
        before = tl.load(last + row - 1 + offs_b[None, :], mask=candidate & (offs_b > 0)[None, :], other=0.0)
        score = tl.maximum(score, before)  # [TOKENS, BB]
        key = tl.where(score == score, score, 0.0).to(tl.int32, bitcast=True)  # [TOKENS, BB]
        key = tl.where(candidate, key, -1)  # [TOKENS, BB]
        count = tl.minimum(wanted, low - begin)

        floor = _floor(key, count)  # [TOKENS]
        taken = key >= floor[:, None]  # [TOKENS, BB]
        surplus = tl.sum(taken.to(tl.int32), 1) - count  # [TOKENS]
        if tl.max(surplus, 0) > 0:  # of equal scores the lower block wins
            equal = key == floor[:, None]  # [TOKENS, BB]
            rank = tl.where(equal, BLOCK_B - offs_b[None, :], 0)  # [TOKENS, BB]
            taken = taken & (~equal | (rank >= _floor(rank, tl.sum(equal.to(tl.int32), 1) - surplus)[:, None]))
        taken = taken & real[:, None]  # [TOKENS, BB]
        tl.store(chosen + row + offs_b[None, :], taken.to(tl.int8), mask=(offs_b < low)[None, :])


@jit(["q_start", "q_length", "first_block", "width", "init", "local", "dense", "tiles", "capacity"])
def _list_kernel(
    chosen,
    entries,
    counts,
    kv_start,
    q_start,
    q_length,
    first_block,
    kv_heads,
    width,
    init,
    local,
    dense,
    tiles,
    capacity,
    TILE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    HAS_START: tl.constexpr,
):
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    start = 0
    if HAS_START:
        start = tl.load(kv_start + i_bh // kv_heads).to(tl.int32)
    first = (tl.maximum(q_start - start, 0) // _BLOCK + first_block) * _BLOCK + i_t * TILE  # within the row
    begin, low = candidates(first // _BLOCK, init, local, dense)
    i_list = i_bh.to(tl.int64) * tiles + first_block * (_BLOCK // TILE) + i_t
    total = 0
    if begin < low:
        offs_t = tl.arange(0, TILE)  # [TILE]
        offs_b = tl.arange(0, BLOCK_B)  # [BB]
        index = first + offs_t + start - q_start  # [TILE]
        real = (index >= tl.maximum(start - q_start, 0)) & (index < q_length)  # [TILE]
        slot = i_bh.to(tl.int64) * (tl.num_programs(0) * TILE) + i_t * TILE + offs_t  # [TILE]
        candidate = (offs_b >= begin) & (offs_b < low)  # [BB]
        p_chosen = chosen + (slot * width)[:, None] + offs_b[None, :]  # [TILE, BB]
        taken = tl.load(p_chosen, mask=real[:, None] & candidate[None, :], other=0).to(tl.int32)  # [TILE, BB]
        readers = tl.sum(taken << offs_t[:, None], 0)  # [BB]
        listed = (readers != 0).to(tl.int32)  # [BB]
        place = tl.cumsum(listed, 0) - 1  # [BB]
        tl.store(entries + i_list * capacity + place, (offs_b << _BITS) | readers, mask=listed != 0)
        total = tl.sum(listed, 0)
    tl.store(counts + i_list, total)
