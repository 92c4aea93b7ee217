"""Triton kernels of the lines.

The largest entries of a row that make up a mass are found without a sort: a search over the bits of the float at which
to cut, four candidates a step (floats that are not negative order as their bits do). The pooled attention of
query-aware heads is kept for a slice of the heads at a time, other heads leave their programs at once.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from sparse_patch.call import AttentionCall
from sparse_patch.ops.lines.rules import LineRule, QueryAware
from sparse_patch.ops.profiles.triton import stacked_profiles
from sparse_patch.plans import BlockGrid, BlockPlan

_SLICE_BYTES = 56 * 2**20  # of pooled attention that is held at once
_LONG = 2**17  # entries of which one program cannot find the largest soon enough
_CHUNK = 16384  # of such entries, for one program


def choose_lines(
    call: AttentionCall, grid: BlockGrid, mean_k: torch.Tensor, rule: LineRule
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.lines`."""
    batch, heads, q_length, head_dim = call.q.shape
    blocks, block = grid.num_key_blocks, grid.block_size
    profiles = stacked_profiles(call, block)
    counts = grid.row_starts if rule.reach else tokens_within(profiles, rule.gamma)
    pooled = mean_k.new_empty(3, batch, heads, blocks)
    _pool_kernel[(batch * heads * triton.cdiv(blocks, 32),)](
        profiles,
        call.q,
        mean_k,
        grid.row_starts,
        pooled,
        *call.q.stride()[:3],
        batch,
        heads,
        call.group_size,
        q_length - block,
        call.kv_length,
        blocks,
        call.scale,
        call.softcap or 1.0,
        HAS_SOFTCAP=call.softcap is not None,
        FROM_START=not rule.reach,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK=block,
    )
    lines = torch.empty(2, batch, heads, blocks, dtype=torch.bool, device=call.q.device)
    aware = torch.empty(batch, heads, dtype=torch.bool, device=call.q.device)
    _choose_kernel[(batch * heads,)](
        pooled,
        counts,
        grid.row_starts,
        lines,
        aware,
        batch,
        heads,
        call.kv_length,
        blocks,
        rule.gamma,
        rule.tau,
        rule.min_blocks,
        min(rule.max_blocks or blocks, blocks),
        rule.dense_length,
        REACH=rule.reach,
        BLOCK=block,
        BLOCK_N=triton.next_power_of_2(blocks),
    )
    verticals, slashes = lines
    if rule.reach:
        slashes = slashes | F.pad(slashes, (1, -1))
    return verticals, slashes, aware


def tokens_within(mass: torch.Tensor, gamma: float) -> torch.Tensor:
    """1 + how many of the largest entries of `mass` `[..., n]`, all in [0, 2), have a sum of at most `gamma`, int64."""
    rows = mass.reshape(-1, mass.shape[-1])
    counts = torch.empty(len(rows), dtype=torch.int64, device=mass.device)
    block = min(16384, triton.next_power_of_2(rows.shape[1]))
    _count_kernel[(len(rows),)](rows, counts, gamma, rows.shape[1], BLOCK=block, num_warps=max(4, block // 512))
    return counts.view(mass.shape[:-1])


def plan_of_lines(
    verticals: torch.Tensor, slashes: torch.Tensor, aware: QueryAware | None, grid: BlockGrid
) -> BlockPlan:
    """See `ops.lines`."""
    batch, heads, num_blocks = verticals.shape
    queries, device = grid.num_query_blocks, verticals.device
    indices = torch.empty(batch, heads, queries, num_blocks, dtype=torch.int32, device=device)
    counts = torch.empty(batch, heads, queries, dtype=torch.int32, device=device)
    geometry = (grid.row_starts, grid.q_start, grid.kv_length)
    held = batch * heads if aware is None else max(1, _SLICE_BYTES // (4 * queries * num_blocks))
    attention, floors = counts, counts  # not read without query-aware heads
    if aware is not None:
        attention = torch.empty(min(held, batch * heads), queries, num_blocks, dtype=torch.float32, device=device)
        floors = torch.empty(batch * heads, _floors(aware, grid), dtype=torch.int32, device=device)
    for head in range(0, batch * heads, held):
        number = min(held, batch * heads - head)
        if aware is not None:
            _attend_pooled(aware, attention, head, number, grid)
            _cut(aware, attention, floors, head, number, grid)
        _plan_kernel[(number * queries,)](
            verticals,
            slashes,
            verticals if aware is None else aware.heads,
            attention,
            floors,
            *geometry,
            indices,
            counts,
            head,
            heads,
            queries,
            num_blocks,
            AWARE=aware is not None,
            EACH_ROW=aware is not None and aware.each_row,
            FLOORS=floors.shape[1] if aware is not None and not aware.each_row else 1,
            SIDE=grid.block_size,
            BLOCK=min(1024, triton.next_power_of_2(num_blocks)),
        )
    return BlockPlan(indices, counts, grid)


def _floors(aware: QueryAware, grid: BlockGrid) -> int:
    """Floors that are kept for a head: one for each query block, one for each step of a long search, or one."""
    if aware.each_row:
        return grid.num_query_blocks
    return 9 if grid.num_query_blocks * grid.num_key_blocks > _LONG else 1


def _attend_pooled(
    aware: QueryAware,
    attention: torch.Tensor,
    head: int,
    number: int,
    grid: BlockGrid,
) -> None:
    """The pooled attention of some heads, where they are query-aware."""
    call, queries, block_i = aware.call, attention.shape[1], 16
    _pooled_kernel[(number * triton.cdiv(queries, block_i),)](
        call.q,
        aware.mean_k,
        aware.heads,
        attention,
        grid.row_starts,
        *call.q.stride()[:3],
        call.q_start,
        call.kv_length,
        head,
        call.q.shape[1],
        call.group_size,
        queries,
        grid.num_key_blocks,
        call.scale,
        call.softcap or 1.0,
        HAS_SOFTCAP=call.softcap is not None,
        D=call.q.shape[3],
        BLOCK_D=max(16, triton.next_power_of_2(call.q.shape[3])),
        SIDE=grid.block_size,
        BLOCK_I=block_i,
        BLOCK_J=64,
    )


def _cut(
    aware: QueryAware, attention: torch.Tensor, floors: torch.Tensor, head: int, number: int, grid: BlockGrid
) -> None:
    """Where to cut the attention of some heads: entries whose bits are above the floor are taken."""
    heads, queries, num_blocks = aware.heads.shape[1], *attention.shape[1:]
    if not aware.each_row and queries * num_blocks > _LONG:
        return _cut_long(aware, attention, floors, head, number, grid)
    length = num_blocks if aware.each_row else queries * num_blocks
    block = min(4096 if aware.each_row else 16384, triton.next_power_of_2(length))
    _floor_kernel[(number * floors.shape[1],)](
        attention,
        aware.heads,
        grid.row_starts,
        grid.q_start,
        grid.kv_length,
        floors,
        head,
        heads,
        length,
        aware.gamma,
        aware.max_blocks or 0,
        ROWS=floors.shape[1],
        EACH_ROW=aware.each_row,
        LIMITED=aware.max_blocks is not None,
        SIDE=grid.block_size,
        BLOCK=block,
        num_warps=max(4, block // 512),
    )


def _cut_long(
    aware: QueryAware, attention: torch.Tensor, floors: torch.Tensor, head: int, number: int, grid: BlockGrid
) -> None:
    """The same with many programs for a head, and a launch for each step of the search."""
    heads, length = aware.heads.shape[1], attention[0].numel()
    chunks = triton.cdiv(length, _CHUNK)
    sums = attention.new_empty(2, number, chunks, 16)
    for step in range(9):
        _digit_kernel[(number * chunks,)](
            attention,
            aware.heads,
            grid.row_starts,
            grid.q_start,
            grid.kv_length,
            sums[step % 2],
            sums[1 - step % 2],
            floors,
            head,
            heads,
            length,
            chunks,
            aware.gamma,
            step,
            SIDE=grid.block_size,
            CHUNK=_CHUNK,
            CHUNKS=triton.next_power_of_2(chunks),
            num_warps=8,
        )


@triton.jit
def _query_blocks(row_starts, q_start, keys, i_b, SIDE: tl.constexpr):
    """The grid index of a row's first query block, and how many a row has."""
    start = tl.load(row_starts + i_b).to(tl.int32)
    first = tl.maximum(q_start - start, 0) // SIDE
    return first, tl.cdiv(keys - start, SIDE) - first


@triton.jit
def _enough(mass, number, limit, most, REACH: tl.constexpr, LIMITED: tl.constexpr):
    """1 if these entries are enough: a sum that reaches the limit (or the most entries there may be), or is above."""
    total = tl.sum(mass, 0)
    if REACH:
        enough = total >= limit
        if LIMITED:
            enough = enough | (tl.sum(number, 0) >= most)
    else:
        enough = total > limit
    return enough.to(tl.int32)


@triton.jit
def _search(p_x, n, limit, most, REACH: tl.constexpr, LIMITED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest bits such that the entries with at least those are enough. Entries lie in [0, 2); all are enough."""
    found = 0
    for step in tl.range(0, 15):
        digit = 1 << (28 - 2 * step)
        mass_1 = tl.zeros([BLOCK], dtype=tl.float32)
        mass_2 = tl.zeros([BLOCK], dtype=tl.float32)
        mass_3 = tl.zeros([BLOCK], dtype=tl.float32)
        number_1 = tl.zeros([BLOCK], dtype=tl.int32)
        number_2 = tl.zeros([BLOCK], dtype=tl.int32)
        number_3 = tl.zeros([BLOCK], dtype=tl.int32)
        for i in tl.range(0, n, BLOCK):
            offs = i + tl.arange(0, BLOCK)
            x = tl.load(p_x + offs, mask=offs < n, other=0.0)
            above = x.to(tl.int32, bitcast=True) - found
            mass_1 += tl.where(above >= digit, x, 0.0)
            mass_2 += tl.where(above >= 2 * digit, x, 0.0)
            mass_3 += tl.where(above >= 3 * digit, x, 0.0)
            if LIMITED:
                number_1 += (above >= digit).to(tl.int32)
                number_2 += (above >= 2 * digit).to(tl.int32)
                number_3 += (above >= 3 * digit).to(tl.int32)
        digits = _enough(mass_1, number_1, limit, most, REACH, LIMITED)
        digits += _enough(mass_2, number_2, limit, most, REACH, LIMITED)
        digits += _enough(mass_3, number_3, limit, most, REACH, LIMITED)
        found += digit * digits
    return found


@triton.jit(do_not_specialize=["n"])
def _count_kernel(x, counts, gamma, n, BLOCK: tl.constexpr):
    """`tokens_within` of one row."""
    pid = tl.program_id(0)
    p_x = x + pid.to(tl.int64) * n
    cut = _search(p_x, n, gamma, 0, False, False, BLOCK)
    above = tl.zeros([BLOCK], dtype=tl.int32)
    mass = tl.zeros([BLOCK], dtype=tl.float32)
    for i in tl.range(0, n, BLOCK):
        offs = i + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + offs, mask=offs < n, other=0.0)
        taken = (b_x.to(tl.int32, bitcast=True) > cut) & (offs < n)
        above += taken.to(tl.int32)
        mass += tl.where(taken, b_x, 0.0)
    # Of the entries that equal the cut, as many as still fit; not all do, or the cut would be lower.
    value = tl.maximum(cut, 1).to(tl.float32, bitcast=True)
    ties = tl.where(cut > 0, ((gamma - tl.sum(mass, 0)) / value).to(tl.int32), 0)
    tl.store(counts + pid, (tl.sum(above, 0) + tl.maximum(ties, 0) + 1).to(tl.int64))


@triton.jit(do_not_specialize=["q_start", "keys", "head", "heads", "n", "most"])
def _floor_kernel(
    attention, aware, row_starts, q_start, keys, floors, head, heads, n, gamma, most,
    ROWS: tl.constexpr, EACH_ROW: tl.constexpr, LIMITED: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_bh = head + pid // ROWS
    if tl.load(aware + i_bh) == 0:
        return
    if EACH_ROW:
        floor = _search(attention + pid.to(tl.int64) * n, n, gamma, most, True, LIMITED, BLOCK) - 1
    else:
        _, rows = _query_blocks(row_starts, q_start, keys, i_bh // heads, SIDE)
        limit = gamma * rows.to(tl.float32)
        floor = _search(attention + pid.to(tl.int64) * n, n, limit, most, False, False, BLOCK)
    tl.store(floors + i_bh * ROWS + pid % ROWS, floor)


@triton.jit(do_not_specialize=["q_start", "keys", "head", "heads", "n", "chunks", "step"])
def _digit_kernel(
    attention, aware, row_starts, q_start, keys, sums, sums_before, floors, head, heads, n, chunks, gamma, step,
    SIDE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One step of the search for a head's floor: four more of its bits from the sums of the step before, new sums.

    Every program of a head adds the same sums in the same order, so that all find the same bits.
    """
    pid = tl.program_id(0)
    i_row, i_chunk = pid // chunks, pid % chunks
    i_bh = head + i_row
    if tl.load(aware + i_bh) == 0:
        return
    offs_n = tl.arange(0, 16)
    floor = tl.load(floors + i_bh * 9 + tl.maximum(step - 1, 0)) if step > 0 else 0
    if step > 0:
        offs_c = tl.arange(0, CHUNKS)
        p_before = sums_before + (i_row * chunks + offs_c[:, None]) * 16 + offs_n[None, :]
        mass = tl.sum(tl.load(p_before, mask=(offs_c < chunks)[:, None], other=0.0), 0)
        _, rows = _query_blocks(row_starts, q_start, keys, i_bh // heads, SIDE)
        limit = gamma * rows.to(tl.float32)
        digits = tl.sum(((mass > limit) & (offs_n > 0)).to(tl.int32), 0)
        floor += digits << (32 - 4 * step)
    if i_chunk == 0:
        tl.store(floors + i_bh * 9 + step, floor)
    if step < 8:
        candidates = floor + (offs_n << (28 - 4 * step))
        mass = tl.zeros([16], dtype=tl.float32)
        for i in tl.range(i_chunk * CHUNK, tl.minimum((i_chunk + 1) * CHUNK, n), 1024):
            offs = i + tl.arange(0, 1024)
            x = tl.load(attention + i_row.to(tl.int64) * n + offs, mask=offs < n, other=0.0)
            bits = x.to(tl.int32, bitcast=True)
            mass += tl.sum(tl.where(bits[:, None] >= candidates[None, :], x[:, None], 0.0), 0)
        mass = tl.where((step == 0) & (offs_n > 3), 0.0, mass)  # beyond the bits of 2.0
        tl.store(sums + (i_row * chunks + i_chunk) * 16 + offs_n, mass)


@triton.jit(do_not_specialize=["batch", "heads", "first_query", "keys", "blocks"])
def _pool_kernel(
    profiles, q, mean_k, row_starts, pooled, stride_qb, stride_qh, stride_qs, batch, heads, group, first_query, keys,
    blocks, scale, softcap, HAS_SOFTCAP: tl.constexpr, FROM_START: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both profiles summed over blocks, and the logits of the last queries' mean against the mean keys."""
    tiles = tl.cdiv(blocks, 32)
    pid = tl.program_id(0)
    i_bh = (pid // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    start = tl.load(row_starts + i_b).to(tl.int32)
    shift = 0
    if FROM_START:  # what the row's last block lacks shifts the distances
        shift = tl.cdiv(keys - start, BLOCK) * BLOCK - (keys - start)
    offs_n = (pid % tiles) * 32 + tl.arange(0, 32)
    offs_s = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, BLOCK_D)
    at_key = start + offs_n[:, None] * BLOCK + offs_s[None, :]
    mass = tl.load(profiles + i_bh * keys + at_key, mask=at_key < keys, other=0.0)
    tl.store(pooled + i_bh * blocks + offs_n, tl.sum(mass, 1), mask=offs_n < blocks)
    far = offs_n[:, None] * BLOCK + offs_s[None, :] - shift
    distances = batch.to(tl.int64) * heads + i_bh
    mass = tl.load(profiles + distances * keys + far, mask=(far >= 0) & (far < keys), other=0.0)
    tl.store(pooled + distances * blocks + offs_n, tl.sum(mass, 1), mask=offs_n < blocks)
    p_q = q + i_b * stride_qb + i_h * stride_qh + (first_query + offs_s).to(tl.int64)[:, None] * stride_qs
    b_q = tl.load(p_q + offs_d[None, :], mask=(offs_d < D)[None, :], other=0.0).to(tl.float32)
    mean_q = tl.sum(b_q, 0) / BLOCK * scale
    kv_head = i_b * (heads // group) + i_h // group
    p_k = mean_k + (kv_head * blocks + offs_n[:, None]) * D + offs_d[None, :]
    b_k = tl.load(p_k, mask=(offs_n < blocks)[:, None] & (offs_d < D)[None, :], other=0.0)
    s = tl.sum(b_k * mean_q[None, :], 1)
    if HAS_SOFTCAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    tl.store(pooled + (distances + batch.to(tl.int64) * heads) * blocks + offs_n, s, mask=offs_n < blocks)


@triton.jit
def _number_reaching(mass, exists, offs, gamma):
    """How many entries, number 0 first and then the largest, it takes until their sum is at least `gamma`."""
    first = tl.sum(tl.where(offs == 0, mass, 0.0), 0)
    others = tl.where(exists & (offs > 0), mass, 0.0)
    bits = others.to(tl.int32, bitcast=True)
    cut = 0
    for step in tl.range(0, 30):
        candidate = cut + (1 << (29 - step))
        enough = first + tl.sum(tl.where(bits >= candidate, others, 0.0), 0) >= gamma
        cut = tl.where(enough, candidate, cut)
    above = bits > cut
    missing = gamma - first - tl.sum(tl.where(above, others, 0.0), 0)
    value = tl.maximum(cut, 1).to(tl.float32, bitcast=True)
    ties = tl.where((missing > 0) & (cut > 0), tl.ceil(missing / value), 0.0).to(tl.int32)
    return 1 + tl.sum(above.to(tl.int32), 0) + ties


@triton.jit
def _largest(mass, exists, offs, wanted):
    """Marks as many of the largest entries as wanted, number 0 first; ties go to the lower number."""
    bits = tl.where(exists, mass.to(tl.int32, bitcast=True), -1)
    bits = tl.where(offs == 0, 0x7F800000, bits)
    cut = 0
    for step in tl.range(0, 31):
        candidate = cut + (1 << (30 - step))
        enough = tl.sum((bits >= candidate).to(tl.int32), 0) >= wanted
        cut = tl.where(enough, candidate, cut)
    above = (bits > cut).to(tl.int32)
    ties = (bits == cut).to(tl.int32)
    return (above != 0) | ((ties != 0) & (tl.cumsum(ties, 0) <= wanted - tl.sum(above, 0)))


@triton.jit(do_not_specialize=["batch", "heads", "keys", "blocks", "min_blocks", "max_blocks", "dense_length"])
def _choose_kernel(
    pooled, counts, row_starts, lines, aware, batch, heads, keys, blocks, gamma, tau, min_blocks, max_blocks,
    dense_length, REACH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The lines of one head."""
    i_bh = tl.program_id(0)
    all_heads = batch * heads
    start = tl.load(row_starts + i_bh // heads).to(tl.int32)
    number = tl.cdiv(keys - start, BLOCK)
    offs = tl.arange(0, BLOCK_N)
    exists = offs < number
    p_pooled = pooled + i_bh.to(tl.int64) * blocks + offs
    step = all_heads.to(tl.int64) * blocks
    key_mass = tl.load(p_pooled, mask=exists, other=0.0)
    distance_mass = tl.load(p_pooled + step, mask=exists, other=0.0)
    s = tl.load(p_pooled + 2 * step, mask=exists, other=-float("inf"))
    p = tl.exp(s - tl.max(s, 0))
    p = p / tl.sum(p, 0)
    middle = (p + key_mass) / 2
    if REACH:
        middle = tl.maximum(middle, 1.1754943508222875e-38)
        terms = tl.where(p > 0, p * tl.log(p / middle), 0.0)
        terms += tl.where(key_mass > 0, key_mass * tl.log(key_mass / middle), 0.0)
    else:
        terms = p * tl.log(p / middle) + key_mass * tl.log(key_mass / middle)  # a 0 makes it NaN
    divergence = tl.sum(tl.where(exists, terms, 0.0), 0) / 2
    # NaN is not equal to itself
    is_aware = (divergence == divergence) & (tl.sqrt(tl.maximum(divergence, 0.0)) < tau)
    tl.store(aware + i_bh, is_aware)
    if REACH:
        verticals = _number_reaching(key_mass, exists, offs, gamma)
        slashes = _number_reaching(distance_mass, exists, offs, gamma)
    else:
        verticals = (tl.load(counts + i_bh) // 128 + 1).to(tl.int32)
        slashes = (tl.load(counts + all_heads + i_bh) // 128 + 1).to(tl.int32)
    verticals = tl.where(is_aware, min_blocks, verticals)
    slashes = tl.where(is_aware, min_blocks, slashes)
    verticals = tl.minimum(tl.minimum(tl.maximum(verticals, min_blocks), max_blocks), number)
    slashes = tl.minimum(tl.minimum(tl.maximum(slashes, min_blocks), max_blocks), number)
    p_lines = lines + i_bh.to(tl.int64) * blocks + offs
    every = keys - start <= dense_length
    tl.store(p_lines, _largest(key_mass, exists, offs, verticals) | every, mask=offs < blocks)
    tl.store(p_lines + step, _largest(distance_mass, exists, offs, slashes), mask=offs < blocks)


@triton.jit(do_not_specialize=["q_start", "keys", "head", "heads", "queries", "blocks"])
def _pooled_kernel(
    q, mean_k, aware, attention, row_starts, stride_qb, stride_qh, stride_qs, q_start, keys, head, heads, group,
    queries, blocks, scale, softcap, HAS_SOFTCAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SIDE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """Causal attention of mean queries to mean keys, for some query blocks of a query-aware head."""
    tiles = tl.cdiv(queries, BLOCK_I)
    pid = tl.program_id(0)
    i_bh = head + pid // tiles
    if tl.load(aware + i_bh) == 0:
        return
    i_b, i_h = i_bh // heads, i_bh % heads
    offs_i = (pid % tiles) * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_d = tl.arange(0, BLOCK_D)
    first_block, rows = _query_blocks(row_starts, q_start, keys, i_b, SIDE)
    real = offs_i < rows
    query_block = first_block + offs_i
    start = tl.load(row_starts + i_b).to(tl.int32)
    low = tl.maximum(q_start - start, 0)
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh + offs_d[None, :]
    b_q = tl.zeros([BLOCK_I, BLOCK_D], dtype=tl.float32)
    for i in tl.range(0, SIDE):
        position = query_block * SIDE + i
        there = real & (position >= low) & (position < keys - start)
        rows_q = (position + start - q_start).to(tl.int64)
        b_q += tl.load(p_q + rows_q[:, None] * stride_qs, mask=there[:, None] & (offs_d < D)[None, :], other=0.0)
    number = tl.minimum(query_block * SIDE + SIDE, keys - start) - tl.maximum(query_block * SIDE, low)
    b_q *= (scale / tl.maximum(number, 1))[:, None]
    p_k = mean_k + (i_b * (heads // group) + i_h // group).to(tl.int64) * blocks * D
    p_o = attention + ((i_bh - head).to(tl.int64) * queries + offs_i[:, None]) * blocks
    m_i = tl.full([BLOCK_I], -float("inf"), dtype=tl.float32)
    l_i = tl.zeros([BLOCK_I], dtype=tl.float32)
    for j in tl.range(0, blocks, BLOCK_J):
        offs_j = j + tl.arange(0, BLOCK_J)
        b_k = tl.load(
            p_k + offs_j[None, :] * D + offs_d[:, None],
            mask=(offs_j < blocks)[None, :] & (offs_d < D)[:, None],
            other=0.0,
        )
        s = tl.dot(b_q, b_k, input_precision="tf32x3")
        if HAS_SOFTCAP:
            s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
        seen = (offs_j[None, :] <= query_block[:, None]) & real[:, None] & (offs_j < blocks)[None, :]
        s = tl.where(seen, s, -float("inf"))
        tl.store(p_o + offs_j[None, :], s, mask=(offs_i < queries)[:, None] & (offs_j < blocks)[None, :])
        m_new = tl.maximum(m_i, tl.max(s, 1))
        shift = tl.where(m_new == -float("inf"), 0.0, m_new)
        l_i = l_i * tl.exp(m_i - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        m_i = m_new
    tl.debug_barrier()  # the logits that other threads of this program wrote are read below
    lse = tl.where(l_i > 0, m_i + tl.log(l_i), 0.0)
    for j in tl.range(0, blocks, BLOCK_J):
        offs_j = j + tl.arange(0, BLOCK_J)
        mask = (offs_i < queries)[:, None] & (offs_j < blocks)[None, :]
        s = tl.load(p_o + offs_j[None, :], mask=mask, other=-float("inf"))
        tl.store(p_o + offs_j[None, :], tl.exp(s - lse[:, None]), mask=mask)


@triton.jit(do_not_specialize=["q_start", "keys", "head", "heads", "queries", "blocks"])
def _plan_kernel(
    verticals, slashes, aware, attention, floors, row_starts, q_start, keys, indices, counts, head, heads, queries,
    blocks, AWARE: tl.constexpr, EACH_ROW: tl.constexpr, FLOORS: tl.constexpr, SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The list of one query block."""
    pid = tl.program_id(0)
    i_bh, i_q = head + pid // queries, pid % queries
    i_b = i_bh // heads
    first_block, rows = _query_blocks(row_starts, q_start, keys, i_b, SIDE)
    query_block = first_block + i_q
    end = tl.where(i_q < rows, query_block + 1, 0)
    i_list = i_bh.to(tl.int64) * queries + i_q
    chosen_end, floor = 0, 0
    if AWARE:
        if tl.load(aware + i_bh) != 0:
            chosen_end = end
            floor = tl.load(floors + (i_list if EACH_ROW else i_bh * FLOORS + FLOORS - 1))
    count = 0
    for j in tl.range(0, end, BLOCK):
        offs_j = j + tl.arange(0, BLOCK)
        mask = offs_j < end
        taken = tl.load(verticals + i_bh.to(tl.int64) * blocks + offs_j, mask=mask, other=0) != 0
        distance = query_block - offs_j
        taken = taken | (tl.load(slashes + i_bh.to(tl.int64) * blocks + distance, mask=mask, other=0) != 0)
        if AWARE:
            p_a = attention + pid.to(tl.int64) * blocks + offs_j
            b_a = tl.load(p_a, mask=offs_j < chosen_end, other=0.0)
            taken = taken | ((b_a.to(tl.int32, bitcast=True) > floor) & (offs_j < chosen_end))
        taken = (taken & mask).to(tl.int32)
        place = count + tl.cumsum(taken, 0) - 1
        tl.store(indices + i_list * blocks + place, offs_j, mask=taken != 0)
        count += tl.sum(taken, 0)
    tl.store(counts + i_list, count)
