"""Triton kernels that choose the lines of a head from the attention of its last queries."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import launch_op
from sparse_patch.kernels.pieces import softcap_logits
from sparse_patch.ops.selection.last_queries.triton import stacked_profiles
from sparse_patch.ops.selection.vertical_slash.params import VerticalSlashParams
from sparse_patch.ops.selection.vertical_slash.triton.search import tokens_within
from sparse_patch.plans import BlockGrid


def choose_vertical_slash(
    call: AttentionCall, grid: BlockGrid, mean_k: torch.Tensor, rule: VerticalSlashParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.selection.vertical_slash`."""
    profiles = stacked_profiles(call, grid.block_size)
    counts = grid.row_starts if rule.reach else tokens_within(profiles, rule.gamma)
    most = min(rule.max_blocks or grid.num_key_blocks, grid.num_key_blocks)
    lines, aware = vertical_slash_of_profiles(
        call.q, mean_k, profiles, counts, grid.row_starts, grid.block_size, call.scale, call.softcap or 0.0,
        rule.gamma, rule.tau, rule.min_blocks, most, rule.dense_length, rule.reach,
    )  # fmt: skip
    verticals, slashes = lines
    if rule.reach:
        slashes = slashes | F.pad(slashes, (1, -1))
    return verticals, slashes, aware


def _outputs(q: torch.Tensor, mean_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lines = torch.empty(2, *q.shape[:2], mean_k.shape[2], dtype=torch.bool, device=q.device)
    return lines, torch.empty(q.shape[:2], dtype=torch.bool, device=q.device)


@launch_op("vertical_slash_of_profiles", _outputs)
def vertical_slash_of_profiles(
    q: torch.Tensor,
    mean_k: torch.Tensor,
    profiles: torch.Tensor,
    counts: torch.Tensor,
    row_starts: torch.Tensor,
    block: int,
    scale: float,
    softcap: float,
    gamma: float,
    tau: float,
    min_blocks: int,
    max_blocks: int,
    dense_length: int,
    reach: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels' launches; softcap 0 for none. The other arguments are those of a `VerticalSlashParams`.

    Returns:
        Columns and diagonals, bool `[2, B, Hq, N]`, and which heads are query-aware, bool `[B, Hq]`.
    """
    batch, heads = q.shape[:2]
    blocks, keys = mean_k.shape[2], profiles.shape[3]
    row_starts = row_starts.contiguous()
    pooled = _pooled(q, mean_k.contiguous(), profiles, row_starts, block, scale, softcap, from_start=not reach)
    lines, aware = _outputs(q, mean_k)
    _choose_kernel[(batch * heads,)](
        pooled,
        counts.contiguous(),
        row_starts,
        lines,
        aware,
        batch,
        heads,
        keys,
        blocks,
        gamma,
        tau,
        min_blocks,
        max_blocks,
        dense_length,
        REACH=reach,
        BLOCK=block,
        BLOCK_N=triton.next_power_of_2(blocks),
    )
    return lines, aware


def _pooled(
    q: torch.Tensor,
    mean_k: torch.Tensor,
    profiles: torch.Tensor,
    row_starts: torch.Tensor,
    block: int,
    scale: float,
    softcap: float,
    from_start: bool,
) -> torch.Tensor:
    """Both profiles summed over blocks, and the logits of the last queries' mean, float32 `[3, B, Hq, N]`."""
    batch, heads, q_length, head_dim = q.shape
    blocks = mean_k.shape[2]
    pooled = mean_k.new_empty(3, batch, heads, blocks)
    _pool_kernel[(batch * heads * triton.cdiv(blocks, 32),)](
        profiles,
        q,
        mean_k,
        row_starts,
        pooled,
        *q.stride(),
        batch,
        heads,
        heads // mean_k.shape[1],
        q_length - block,
        profiles.shape[3],
        blocks,
        scale,
        softcap or 1.0,
        HAS_SOFTCAP=softcap > 0,
        FROM_START=from_start,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK=block,
    )
    return pooled


@jit(["batch", "heads", "first_query", "keys", "blocks"])
def _pool_kernel(
    profiles, q, mean_k, row_starts, pooled, stride_qb, stride_qh, stride_qs, stride_qd, batch, heads, group,
    first_query, keys, blocks, scale, softcap, HAS_SOFTCAP: tl.constexpr, FROM_START: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both profiles summed over blocks, and the logits of the last queries' mean against the mean keys."""
    tiles = tl.cdiv(blocks, 32)
    pid = tl.program_id(0)
    i_bh = (pid // tiles).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    start = tl.load(row_starts + i_b).to(tl.int32)
    shift = 0
    if FROM_START:  # tokens missing in the row's last block shift the distances
        shift = tl.cdiv(keys - start, BLOCK) * BLOCK - (keys - start)
    offs_n = (pid % tiles) * 32 + tl.arange(0, 32)  # [32]
    offs_s = tl.arange(0, BLOCK)  # [BLOCK]
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    at_key = start + offs_n[:, None] * BLOCK + offs_s[None, :]  # [32, BLOCK]
    mass = tl.load(profiles + i_bh * keys + at_key, mask=at_key < keys, other=0.0)  # [32, BLOCK]
    tl.store(pooled + i_bh * blocks + offs_n, tl.sum(mass, 1), mask=offs_n < blocks)
    far = offs_n[:, None] * BLOCK + offs_s[None, :] - shift  # [32, BLOCK]
    distances = batch.to(tl.int64) * heads + i_bh
    mass = tl.load(profiles + distances * keys + far, mask=(far >= 0) & (far < keys), other=0.0)  # [32, BLOCK]
    tl.store(pooled + distances * blocks + offs_n, tl.sum(mass, 1), mask=offs_n < blocks)
    p_q = q + i_b * stride_qb + i_h * stride_qh + (first_query + offs_s).to(tl.int64)[:, None] * stride_qs  # [BLOCK, 1]
    p_q = p_q + offs_d.to(tl.int64)[None, :] * stride_qd  # [BLOCK, BD]
    b_q = tl.load(p_q, mask=(offs_d < D)[None, :], other=0.0).to(tl.float32)  # [BLOCK, BD]
    mean_q = tl.sum(b_q, 0) / BLOCK * scale  # [BD]
    kv_head = i_b * (heads // group) + i_h // group
    p_k = mean_k + (kv_head * blocks + offs_n[:, None]) * D + offs_d[None, :]  # [32, BD]
    b_k = tl.load(p_k, mask=(offs_n < blocks)[:, None] & (offs_d < D)[None, :], other=0.0)  # [32, BD]
    s = tl.sum(b_k * mean_q[None, :], 1)  # [32]
    if HAS_SOFTCAP:
        s = softcap_logits(s, 1.0, softcap)  # [32]
    tl.store(pooled + (distances + batch.to(tl.int64) * heads) * blocks + offs_n, s, mask=offs_n < blocks)


@triton.jit
def _number_reaching(mass, exists, offs, gamma):
    """Number of entries, entry 0 first and then the largest, until their sum is at least `gamma`."""
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
    """Mark the `wanted` largest entries, entry 0 first; ties go to the lower index."""
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


@jit(["batch", "heads", "keys", "blocks", "min_blocks", "max_blocks", "dense_length"])
def _choose_kernel(
    pooled, counts, row_starts, lines, aware, batch, heads, keys, blocks, gamma, tau, min_blocks, max_blocks,
    dense_length, REACH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Choose the lines of one head."""
    i_bh = tl.program_id(0)
    all_heads = batch * heads
    start = tl.load(row_starts + i_bh // heads).to(tl.int32)
    number = tl.cdiv(keys - start, BLOCK)
    offs = tl.arange(0, BLOCK_N)  # [BN]
    exists = offs < number  # [BN]
    p_pooled = pooled + i_bh.to(tl.int64) * blocks + offs  # [BN]
    step = all_heads.to(tl.int64) * blocks
    key_mass = tl.load(p_pooled, mask=exists, other=0.0)  # [BN]
    distance_mass = tl.load(p_pooled + step, mask=exists, other=0.0)  # [BN]
    s = tl.load(p_pooled + 2 * step, mask=exists, other=-float("inf"))  # [BN]
    p = tl.exp(s - tl.max(s, 0))  # [BN]
    p = p / tl.sum(p, 0)  # [BN]
    middle = (p + key_mass) / 2  # [BN]
    if REACH:
        middle = tl.maximum(middle, 1.1754943508222875e-38)  # [BN]
        terms = tl.where(p > 0, p * tl.log(p / middle), 0.0)  # [BN]
        terms += tl.where(key_mass > 0, key_mass * tl.log(key_mass / middle), 0.0)  # [BN]
    else:
        terms = p * tl.log(p / middle) + key_mass * tl.log(key_mass / middle)  # [BN]; a 0 makes it NaN
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
    p_lines = lines + i_bh.to(tl.int64) * blocks + offs  # [BN]
    every = keys - start <= dense_length
    tl.store(p_lines, _largest(key_mass, exists, offs, verticals) | every, mask=offs < blocks)
    tl.store(p_lines + step, _largest(distance_mass, exists, offs, slashes), mask=offs < blocks)
