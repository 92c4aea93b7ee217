"""Triton kernels that choose blocks: scores of a few thousand tokens at a time, then the best of each token.

The scores of all tokens would be many times the keys, so slices of the queries go through both kernels one after the
other. A program of the first holds some tokens with all query heads of their KV head as the rows of one product of
matrices. It goes through the coarse compressed keys for the LSE, then through the fine ones, and sums the rows of a
token. A block's score is a maximum over five columns, of which the first is the last of the block before: of every
block it writes the maximum over its own four, and the last of them, and the second kernel takes the maximum of both.

A program of the second chooses for a token. It bisects for the smallest score that is chosen, over the scores' bits
(none is negative, so the bits are numbers of the same order). The third makes one list for a tile of tokens of what any
of them chose, with the tokens that did.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sparse_patch.call import AttentionCall
from sparse_patch.ops.backends import kernel_unsupported
from sparse_patch.ops.compressed_keys.rules import BLOCK, COLUMNS, BlockRule
from sparse_patch.ops.kernels import LOG2_E, add_to_exp_sum, by_row, copyable, gpu, launch_op, softcap_logits
from sparse_patch.plans import BLOCK_BITS, BlockGrid

_BITS: tl.constexpr = tl.constexpr(BLOCK_BITS)
_BLOCK: tl.constexpr = tl.constexpr(BLOCK)
_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)
_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)
_SCORES_BYTES = 128 << 20  # of a slice of the queries at most: smaller ones leave a large GPU idle at their ends
_WIDEST = 1 << 17  # blocks of all tokens of a tile that a program can hold


@dataclass(frozen=True)
class Tile:
    """How the scoring kernel is cut: tokens of a program, columns of a step, warps, depth of the pipeline."""

    tokens: int
    columns: int
    num_warps: int
    num_stages: int


def tile_of(block_g: int, head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile for a group (a power of two), a head size and a dtype."""
    if dtype == torch.float32:
        return Tile(max(1, 32 // block_g), 32, 8, 1)
    return Tile(max(1, min(128 // block_g, BLOCK)), 128 if head_dim <= 128 else 64, 8, 2)


def unsupported(call: AttentionCall, tile: int) -> str | None:
    """Why the kernels cannot choose where they run; None if they can."""
    if call.group_size > 128:
        return f"backend triton: {call.group_size} query heads of a KV head"
    if tile * triton.next_power_of_2(-(-call.kv_length // BLOCK)) > _WIDEST:
        return f"backend triton: {call.kv_length} keys"
    return kernel_unsupported(call)


def choose(
    call: AttentionCall, k1: torch.Tensor, k2: torch.Tensor, rule: BlockRule, grid: BlockGrid, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.compressed_keys.torch.choose`."""
    return choose_token_blocks(
        call.q,
        k1,
        k2,
        call.kv_start,
        call.scale,
        call.softcap or 0.0,
        call.q_start,
        call.kv_length,
        rule.init_blocks,
        rule.local_blocks,
        rule.dense_blocks,
        rule.chosen,
        tile,
        grid.num_query_blocks,
    )


@launch_op("choose_token_blocks")
def choose_token_blocks(
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    kv_start: torch.Tensor | None,
    scale: float,
    softcap: float,
    q_start: int,
    kv_length: int,
    init_blocks: int,
    local_blocks: int,
    dense_blocks: int,
    chosen: int,
    tile: int,
    query_blocks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels' launches, slice by slice; arguments as in `AttentionCall` and `BlockRule`, softcap 0 for none.

    Returns:
        Entries and counts of a `TokenBlockPlan`.
    """
    batch, heads, q_length, head_dim = q.shape
    kv_heads = k1.shape[1]
    group, key_blocks = heads // kv_heads, -(-kv_length // BLOCK)
    entries, counts = _lists(q, kv_heads, query_blocks, key_blocks, chosen, tile)
    block_g, block_d = triton.next_power_of_2(group), max(16, triton.next_power_of_2(head_dim))
    cut = tile_of(block_g, head_dim, q.dtype)
    block_g = max(block_g, 16 // cut.tokens)
    k1, k2 = copyable(k1), copyable(k2)
    descriptors = [TensorDescriptor.from_tensor(x, [1, 1, cut.columns, block_d]) for x in (k1, k2)]
    starts = by_row(kv_start, counts)
    width = -(-key_blocks // (cut.columns // COLUMNS)) * (cut.columns // COLUMNS)
    most = min(_blocks_at_once(batch * kv_heads, width, cut, gpu(q.device)[0]), query_blocks)
    scores = q.new_empty(2, batch * kv_heads * most * BLOCK * width, dtype=torch.float32)
    chosen_map = torch.empty_like(scores[0], dtype=torch.int8)
    tokens = 1 if q.is_cuda else tile  # of a program that chooses; what takes the interpreter time are programs
    for begin in range(0, query_blocks, most):
        size = min(most, query_blocks - begin)
        seen = min(q_start // BLOCK + begin + size, key_blocks)  # of the longest row
        rows = (starts, q_start, q_length, begin)
        always = (init_blocks, local_blocks, dense_blocks)
        _score_kernel[(size * (BLOCK // cut.tokens), batch * kv_heads)](
            q,
            *descriptors,
            scores[0],
            scores[1],
            *rows,
            *q.stride(),
            kv_heads,
            width,
            *always,
            scale,
            softcap,
            D=head_dim,
            BLOCK_D=block_d,
            GROUP=group,
            BLOCK_G=block_g,
            TOKENS=cut.tokens,
            BLOCK_N=cut.columns,
            HAS_START=kv_start is not None,
            HAS_SOFTCAP=softcap > 0,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            num_warps=cut.num_warps,
            num_stages=cut.num_stages,
        )
        block = max(256, triton.next_power_of_2(seen))  # few variants to compile
        _choose_kernel[(size * BLOCK // tokens, batch * kv_heads)](
            scores[0],
            scores[1],
            chosen_map,
            *rows,
            kv_heads,
            width,
            *always,
            chosen,
            TOKENS=tokens,
            BLOCK_B=block,
            HAS_START=kv_start is not None,
            num_warps=min(max(block // 1024, 1), 16),
        )
        _list_kernel[(size * BLOCK // tile, batch * kv_heads)](
            chosen_map,
            entries,
            counts,
            *rows,
            kv_heads,
            width,
            *always,
            entries.shape[2],
            entries.shape[3],
            TILE=tile,
            BLOCK_B=block,
            HAS_START=kv_start is not None,
            num_warps=min(max(tile * block // 2048, 1), 16),
        )
    return entries, counts


@choose_token_blocks.register_fake
def _(q: torch.Tensor, k1: torch.Tensor, *arguments: torch.Tensor | float | None) -> tuple[torch.Tensor, torch.Tensor]:
    chosen, tile, query_blocks = (int(x) for x in arguments[-3:])  # type: ignore[arg-type]
    return _lists(q, k1.shape[1], query_blocks, -(-int(arguments[5]) // BLOCK), chosen, tile)  # type: ignore[arg-type]


def _blocks_at_once(lists: int, width: int, cut: Tile, multiprocessors: int) -> int:
    """Query blocks of a slice: what fits, but no more than fill the GPU with programs a whole number of times."""
    fit = max(1, _SCORES_BYTES // (9 * lists * BLOCK * width))  # a score of each kind, and what is chosen
    programs, at_once = lists * BLOCK // cut.tokens, 2 * multiprocessors  # of a query block; side by side
    return max(fit * programs // at_once * at_once // programs, 1) if fit * programs > at_once else fit


def _lists(
    q: torch.Tensor, kv_heads: int, query_blocks: int, key_blocks: int, chosen: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = len(q), kv_heads, query_blocks * (BLOCK // tile)
    entries = q.new_empty(*shape, min(tile * chosen, key_blocks), dtype=torch.int32)
    return entries, q.new_empty(shape, dtype=torch.int32)


@triton.jit
def _candidates(block, init, local, dense):
    """The blocks that a token of a block chooses among: from and up to."""
    low = tl.where(block < dense, 0, tl.maximum(block - local, 0))
    return tl.minimum(init, low), low


@triton.jit(do_not_specialize=["q_start", "q_length", "first_block", "width", "init", "local", "dense"])
def _score_kernel(
    q,
    k1_desc,
    k2_desc,
    highest,
    last,
    kv_start,
    q_start,
    q_length,
    first_block,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    kv_heads,
    width,
    init,
    local,
    dense,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = TOKENS * BLOCK_G
    BLOCKS: tl.constexpr = BLOCK_N // _COLUMNS  # of a step
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // kv_heads, i_bh % kv_heads
    start = 0
    if HAS_START:
        start = tl.load(kv_start + i_b).to(tl.int32)
    first = (tl.maximum(q_start - start, 0) // _BLOCK + first_block) * _BLOCK + i_t * TOKENS  # within the row
    block = first // _BLOCK
    begin, low = _candidates(block, init, local, dense)
    inside = (first + start < q_start + q_length) & (first + TOKENS + start > q_start)
    if inside & (begin < low):
        offs_r = tl.arange(0, ROWS)
        offs_g = offs_r % BLOCK_G
        offs_m = first + offs_r // BLOCK_G
        index = (offs_m + start - q_start).to(tl.int64)
        real = (index >= tl.maximum(start - q_start, 0)) & (index < q_length) & (offs_g < GROUP)
        offs_d = tl.arange(0, BLOCK_D)
        p_q = q + i_b.to(tl.int64) * stride_qb + (i_h * GROUP + offs_g).to(tl.int64)[:, None] * stride_qh
        p_q = p_q + index[:, None] * stride_qs + offs_d.to(tl.int64)[None, :] * stride_qd
        b_q = tl.load(p_q, mask=real[:, None] & (offs_d < D)[None, :], other=0.0)
        to_log2 = _LOG2_E * (1.0 if HAS_SOFTCAP else scale)

        m_i = tl.full([ROWS], -float("inf"), dtype=tl.float32)
        l_i = tl.zeros([ROWS], dtype=tl.float32)
        full = (block - 1) // BLOCK_N  # steps over coarse keys that every token of the block sees
        for c in tl.range(0, full):
            b_k = k2_desc.load([i_b, i_h, c * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
            s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
            if HAS_SOFTCAP:
                s = softcap_logits(s, scale, softcap)
            m_i, l_i = add_to_exp_sum(m_i, l_i, s * to_log2)
        b_k = k2_desc.load([i_b, i_h, full * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
        s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
        if HAS_SOFTCAP:
            s = softcap_logits(s, scale, softcap)
        seen = full * BLOCK_N + tl.arange(0, BLOCK_N)[None, :] < ((offs_m + 1) // _BLOCK - 1)[:, None]
        m_i, l_i = add_to_exp_sum(m_i, l_i, tl.where(seen, s * to_log2, -float("inf")))
        b_lse = tl.where(offs_g < GROUP, m_i + tl.math.log2(l_i), float("inf"))  # what is no head has weight 0

        slot = i_bh.to(tl.int64) * (tl.num_programs(0) * TOKENS) + i_t * TOKENS + tl.arange(0, TOKENS)
        offs_b = tl.arange(0, BLOCKS)
        is_last = tl.arange(0, _COLUMNS) == _COLUMNS - 1
        for c in tl.range(tl.maximum(begin - 1, 0) // BLOCKS, tl.cdiv(low, BLOCKS)):
            b_k = k1_desc.load([i_b, i_h, c * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)
            s = tl.dot(b_q, b_k.T, input_precision=PRECISION)
            if HAS_SOFTCAP:
                s = softcap_logits(s, scale, softcap)
            p = tl.math.exp2(s * to_log2 - b_lse[:, None])
            p = tl.sum(tl.reshape(p, (TOKENS, BLOCK_G, BLOCK_N)), 1)
            p = tl.reshape(p, (TOKENS, BLOCKS, _COLUMNS))
            p_out = slot[:, None] * width + c * BLOCKS + offs_b[None, :]
            tl.store(highest + p_out, tl.max(p, 2))
            tl.store(last + p_out, tl.sum(tl.where(is_last[None, None, :], p, 0.0), 2))


@triton.jit
def _floor(key, count):
    """For each row a number with `count` keys at or above it, or with the fewest that are more; keys are 0 or more."""
    floor = tl.zeros([key.shape[0]], dtype=tl.int32)
    ceiling = tl.max(key, 1)
    while tl.max(ceiling - floor, 0) > 0:
        middle = floor + ((ceiling - floor + 1) >> 1)
        reached = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        floor = tl.where(reached >= count, middle, floor)
        ceiling = tl.where(reached > count, ceiling, tl.where(reached == count, middle, middle - 1))
    return floor


@triton.jit(do_not_specialize=["q_start", "q_length", "first_block", "width", "init", "local", "dense"])
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
    begin, low = _candidates(first // _BLOCK, init, local, dense)
    inside = (first + start < q_start + q_length) & (first + TOKENS + start > q_start)
    if inside & (begin < low):
        offs_t = tl.arange(0, TOKENS)
        offs_b = tl.arange(0, BLOCK_B)
        index = first + offs_t + start - q_start
        real = (index >= tl.maximum(start - q_start, 0)) & (index < q_length)
        candidate = ((offs_b >= begin) & (offs_b < low))[None, :]
        slot = i_bh.to(tl.int64) * (tl.num_programs(0) * TOKENS) + i_t * TOKENS + offs_t
        row = (slot * width)[:, None]
        score = tl.load(highest + row + offs_b[None, :], mask=candidate, other=0.0)
        before = tl.load(last + row - 1 + offs_b[None, :], mask=candidate & (offs_b > 0)[None, :], other=0.0)
        score = tl.maximum(score, before)
        key = tl.where(score == score, score, 0.0).to(tl.int32, bitcast=True)
        key = tl.where(candidate, key, -1)
        count = tl.minimum(wanted, low - begin)

        floor = _floor(key, count)
        taken = key >= floor[:, None]
        surplus = tl.sum(taken.to(tl.int32), 1) - count
        if tl.max(surplus, 0) > 0:  # of equal scores the lower block wins
            equal = key == floor[:, None]
            rank = tl.where(equal, BLOCK_B - offs_b[None, :], 0)
            taken = taken & (~equal | (rank >= _floor(rank, tl.sum(equal.to(tl.int32), 1) - surplus)[:, None]))
        taken = taken & real[:, None]
        tl.store(chosen + row + offs_b[None, :], taken.to(tl.int8), mask=(offs_b < low)[None, :])


@triton.jit(
    do_not_specialize=["q_start", "q_length", "first_block", "width", "init", "local", "dense", "tiles", "capacity"]
)
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
    begin, low = _candidates(first // _BLOCK, init, local, dense)
    i_list = i_bh.to(tl.int64) * tiles + first_block * (_BLOCK // TILE) + i_t
    total = 0
    if begin < low:
        offs_t = tl.arange(0, TILE)
        offs_b = tl.arange(0, BLOCK_B)
        index = first + offs_t + start - q_start
        real = (index >= tl.maximum(start - q_start, 0)) & (index < q_length)
        slot = i_bh.to(tl.int64) * (tl.num_programs(0) * TILE) + i_t * TILE + offs_t
        candidate = (offs_b >= begin) & (offs_b < low)
        p_chosen = chosen + (slot * width)[:, None] + offs_b[None, :]
        taken = tl.load(p_chosen, mask=real[:, None] & candidate[None, :], other=0).to(tl.int32)
        readers = tl.sum(taken << offs_t[:, None], 0)
        listed = (readers != 0).to(tl.int32)
        place = tl.cumsum(listed, 0) - 1
        tl.store(entries + i_list * capacity + place, (offs_b << _BITS) | readers, mask=listed != 0)
        total = tl.sum(listed, 0)
    tl.store(counts + i_list, total)
