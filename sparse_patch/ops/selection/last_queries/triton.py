"""Triton kernels of the profiles: two passes over the keys; no probability is ever written to memory.

The first pass computes the LSE of each query, the second the sums over columns and diagonals. In a tile of W keys the
diagonals line up in columns after each row is rotated by its own index: `turned[i, c] = tile[i, (i - c) % W]` holds
distances that are `c` plus a multiple of W.
"""

import torch
import triton
import triton.language as tl

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import block_of, by_row, launch_op, precision_of
from sparse_patch.kernels.pieces import LOG2_E, add_to_exp_sum, softcap_logits

_PROGRAMS = 1056  # enough for every GPU; the tiles of a program share its queries


def last_query_profiles(call: AttentionCall, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.last_queries`; `queries` is a power of two from 16 to 128."""
    by_key, by_distance = stacked_profiles(call, queries)
    return by_key, by_distance


def stacked_profiles(call: AttentionCall, queries: int) -> torch.Tensor:
    """Both profiles of `ops.selection.last_queries` in one tensor, float32 `[2, B, Hq, Skv]`."""
    return query_profiles(call.q, call.k, call.kv_start, call.scale, call.softcap or 0.0, queries)


def _outputs(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q.new_empty(2, *q.shape[:2], k.shape[2], dtype=torch.float32)


@launch_op("query_profiles", _outputs)
def query_profiles(
    q: torch.Tensor, k: torch.Tensor, kv_start: torch.Tensor | None, scale: float, softcap: float, queries: int
) -> torch.Tensor:
    """The kernels' launches; softcap 0 for none."""
    batch, heads, q_length, head_dim = q.shape
    keys = k.shape[2]
    all_tiles = triton.cdiv(keys, queries)
    tiles = min(16, max(1, batch * heads * all_tiles // _PROGRAMS))
    splits = triton.cdiv(all_tiles, tiles)
    partial = q.new_empty(batch, heads, splits, queries, dtype=torch.float32)
    profiles = _outputs(q, k).zero_()
    arguments = (
        q,
        k,
        by_row(kv_start, partial),
        *q.stride(),
        *k.stride(),
        heads,
        heads // k.shape[1],
        keys,
        q_length - queries,
        splits,
        tiles,
        LOG2_E.value * scale,
        LOG2_E.value * (softcap or 1.0),
    )
    settings = {
        "D": head_dim,
        "BLOCK_D": block_of(head_dim),
        "R": queries,
        "HAS_START": kv_start is not None,
        "HAS_SOFTCAP": softcap > 0,
        "PRECISION": precision_of(q.dtype),
        "num_warps": 8 if queries == 128 else 4,
        "num_stages": 3 if head_dim <= 128 and q.element_size() == 2 else 1,
    }
    grid = (batch * heads * splits,)
    _lse_kernel[grid](*arguments, partial, **settings)
    # Rotating a tile takes shared memory, so tiles are narrower: two programs then fit on a multiprocessor.
    _profile_kernel[grid](*arguments, partial, profiles, W=min(64, queries), **settings)
    return profiles


@triton.jit
def _tile_logits(
    b_q, p_k, stride_ks, stride_kd, keys, j, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, W: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits, in log2 units, of the R last queries and the W keys from `j`; `-inf` where a query does not see a key.

    `scale` and `softcap` include the conversion to log2 units.
    """
    offs_j = j + tl.arange(0, W)  # [W]
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    rows = offs_j.to(tl.int64)  # [W]
    mask = (offs_j < keys)[None, :] & (offs_d < D)[:, None]  # [BD, W]
    p_tile = p_k + rows[None, :] * stride_ks + offs_d.to(tl.int64)[:, None] * stride_kd  # [BD, W]
    b_k = tl.load(p_tile, mask=mask, other=0.0)  # [BD, W]
    s = tl.dot(b_q, b_k, input_precision=PRECISION)  # [R, W]
    s = softcap_logits(s, scale, softcap) if HAS_SOFTCAP else s * scale  # [R, W]
    seen = offs_j[None, :] <= (keys - R + tl.arange(0, R))[:, None]  # [R, W]
    return tl.where(seen, s, -float("inf"))


@triton.jit
def _queries_and_split(
    q, k, kv_start, stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, heads, group, keys, first_query,
    splits, tiles, D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """The work of a program: a head (of all rows), one split of its keys with begin and end, and the last queries.

    The query heads of a KV head come one after another, so that they share its keys in the cache.
    """
    pid = tl.program_id(0)
    i_s, i_bh = (pid // group) % splits, (pid // group // splits) * group + pid % group
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    start = 0
    if HAS_START:
        start = tl.load(kv_start + i_b).to(tl.int32)
    rows = (first_query + tl.arange(0, R)).to(tl.int64)  # [R]
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    p_q = q + i_b * stride_qb + i_h * stride_qh + rows[:, None] * stride_qs  # [R, 1]
    b_q = tl.load(p_q + offs_d.to(tl.int64)[None, :] * stride_qd, mask=(offs_d < D)[None, :], other=0.0)  # [R, BD]
    p_k = k + i_b * stride_kb + (i_h // group) * stride_kh
    first = start + i_s * tiles * R
    return i_bh, i_s, first, tl.minimum(first + tiles * R, keys), b_q, p_k


@jit(["keys", "first_query", "splits", "tiles"])
def _lse_kernel(
    q, k, kv_start, stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    heads, group, keys, first_query, splits, tiles, scale, softcap, partial,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, HAS_START: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_bh, i_s, first, last, b_q, p_k = _queries_and_split(
        q, k, kv_start, stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, heads, group, keys,
        first_query, splits, tiles, D, BLOCK_D, R, HAS_START,
    )  # fmt: skip
    offs_r = tl.arange(0, R)  # [R]
    m_i = tl.full([R], -float("inf"), dtype=tl.float32)  # [R]
    l_i = tl.zeros([R], dtype=tl.float32)  # [R]
    for j in tl.range(first, last, R):
        # [R, R]
        s = _tile_logits(
            b_q, p_k, stride_ks, stride_kd, keys, j, scale, softcap, D, BLOCK_D, R, R, HAS_SOFTCAP, PRECISION
        )
        m_i, l_i = add_to_exp_sum(m_i, l_i, s)  # [R], [R]
    tl.store(partial + (i_bh.to(tl.int64) * splits + i_s) * R + offs_r, m_i + tl.math.log2(l_i))


@jit(["keys", "first_query", "splits", "tiles"])
def _profile_kernel(
    q, k, kv_start, stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    heads, group, keys, first_query, splits, tiles, scale, softcap, partial, profiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, W: tl.constexpr, HAS_START: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_bh, _, first, last, b_q, p_k = _queries_and_split(
        q, k, kv_start, stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, heads, group, keys,
        first_query, splits, tiles, D, BLOCK_D, R, HAS_START,
    )  # fmt: skip
    offs_r = tl.arange(0, R)  # [R]
    # 1. The LSE of each query, from all splits.
    p_partial = partial + i_bh.to(tl.int64) * splits * R + offs_r[:, None]  # [R, 1]
    m_i = tl.full([R], -float("inf"), dtype=tl.float32)  # [R]
    l_i = tl.zeros([R], dtype=tl.float32)  # [R]
    for i in tl.range(0, splits, 16):  # 16 at a time, as the program only waits for them
        offs_i = i + tl.arange(0, 16)  # [16]
        # [R, 16]
        parts = tl.load(p_partial + offs_i[None, :] * R, mask=(offs_i < splits)[None, :], other=-float("inf"))
        m_i, l_i = add_to_exp_sum(m_i, l_i, parts)  # [R], [R]
    b_lse = m_i + tl.math.log2(l_i * R)  # [R]; times R: the profiles are means over the queries

    # 2. Sums over columns and diagonals.
    p_key = profiles + i_bh.to(tl.int64) * keys
    p_distance = p_key + (tl.num_programs(0) // splits).to(tl.int64) * keys
    offs_w = tl.arange(0, W)  # [W]
    turn = (offs_r[:, None] - offs_w[None, :] + R) % W  # [R, W]
    back = offs_r[:, None] - offs_w[None, :]  # [R, W]; how far a row lies below its column
    # Distances come in bands of W. A tile ends the farthest band that it touches, and begins two others.
    band = keys - R + offs_w  # [W]
    middle = tl.zeros([W], dtype=tl.float32)  # [W]
    nearest = tl.zeros([W], dtype=tl.float32)  # [W]
    for j in tl.range(first, last, W):
        # [R, W]
        s = _tile_logits(
            b_q, p_k, stride_ks, stride_kd, keys, j, scale, softcap, D, BLOCK_D, R, W, HAS_SOFTCAP, PRECISION
        )
        p = tl.math.exp2(s - b_lse[:, None])  # [R, W]
        tl.store(p_key + j + offs_w, tl.sum(p, 0), mask=j + offs_w < keys)
        turned = tl.gather(p, turn, 1)  # [R, W]
        if R == W:
            ended = nearest + tl.sum(tl.where(back >= 0, turned, 0.0), 0)  # [W]
            nearest = tl.sum(tl.where(back < 0, turned, 0.0), 0)
            far = band - j  # [W]
        else:
            ended = middle + tl.sum(tl.where(back >= W, turned, 0.0), 0)  # [W]
            middle = nearest + tl.sum(tl.where((back >= 0) & (back < W), turned, 0.0), 0)  # [W]
            nearest = tl.sum(tl.where(back < 0, turned, 0.0), 0)
            far = band - j + W  # [W]
        # At most two programs add to a distance, so the order of the additions does not matter.
        tl.atomic_add(p_distance + far, ended, mask=(far >= 0) & (far < keys), sem="relaxed")

    # 3. The bands that the last tile has begun.
    end = band - (first + (last - first + W - 1) // W * W)  # [W]
    if R != W:
        tl.atomic_add(p_distance + end + W, middle, mask=end + W >= 0, sem="relaxed")
    tl.atomic_add(p_distance + end, nearest, mask=end >= 0, sem="relaxed")
