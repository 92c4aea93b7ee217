"""Triton kernel: strided product, online softmax and block sums in one program, without a copy of queries or keys.

A program holds one tile of query groups of one head and reads the key groups that they see twice: first for the maximum
and the sum of each query group, then, with a second product, for the block sums. A second product costs less than
writing the logits and reading them back. The product is a loop over stride and head dim, so that a tile's memory
depends on neither.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import by_row, launch_op
from sparse_patch.kernels.pieces import LOG2_E, softcap_logits
from sparse_patch.kernels.slices import slices
from sparse_patch.plans import BlockGrid


@dataclass(frozen=True)
class Tile:
    """The tiling of the kernel: query groups (and as many key groups) per tile, depth of one product, warps, stages."""

    groups: int
    depth: int
    num_warps: int
    num_stages: int


def tile_of(head_dim: int, dtype: torch.dtype, groups_per_block: int) -> Tile:
    """The tile for a head size and dtype; it holds whole blocks."""
    depth = min(triton.next_power_of_2(max(head_dim, 16)), 64 if dtype.itemsize == 2 else 32)
    if dtype.itemsize == 2:
        return Tile(128, depth, 8, 3)
    return Tile(max(64, groups_per_block), depth, 4 if groups_per_block <= 64 else 8, 2)


def block_masses(call: AttentionCall, grid: BlockGrid, stride: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """See `ops.selection.antidiagonal`."""
    batch, heads = call.q.shape[:2]
    start = call.kv_start
    for blocks in slices(grid.num_query_blocks, 4 * batch * heads * grid.num_key_blocks):
        number, visible = blocks.stop - blocks.start, grid.visible_key_blocks(blocks.stop)
        yield (
            blocks,
            antidiagonal_masses(
                call.q, call.k, start, call.scale, call.softcap or 0.0, grid.block_size, stride, call.q_start,
                blocks.start, number, visible,
            ),
        )  # fmt: skip


def _outputs(q: torch.Tensor, num_query_blocks: int, num_key_blocks: int) -> torch.Tensor:
    return q.new_empty(*q.shape[:2], num_query_blocks, num_key_blocks, dtype=torch.float32)


@launch_op("antidiagonal_masses", _outputs)
def antidiagonal_masses(
    q: torch.Tensor,
    k: torch.Tensor,
    kv_start: torch.Tensor | None,
    scale: float,
    softcap: float,
    block_size: int,
    stride: int,
    q_start: int,
    first_block: int,
    num_query_blocks: int,
    num_key_blocks: int,
) -> torch.Tensor:
    """The kernel's launch for `num_query_blocks` query blocks of each row, from its `first_block`; softcap 0 for none.

    Returns:
        Masses, float32 `[B, Hq, num_query_blocks, num_key_blocks]`.
    """
    batch, heads, q_length, head_dim = q.shape
    kv_heads, kv_length = k.shape[1:3]
    per_block = block_size // stride
    masses = _outputs(q, num_query_blocks, num_key_blocks).zero_()
    tile = tile_of(head_dim, q.dtype, per_block)
    num_tiles = triton.cdiv(num_query_blocks * per_block, tile.groups)
    _antidiagonal_kernel[(batch * heads * num_tiles,)](
        q,
        k,
        masses,
        by_row(kv_start, masses),
        *q.stride(),
        *k.stride(),
        heads,
        kv_heads,
        num_tiles,
        q_length,
        kv_length,
        q_start,
        first_block,
        num_query_blocks,
        num_key_blocks,
        scale,
        softcap,
        D=head_dim,
        BLOCK=block_size,
        STRIDE=stride,
        BLOCK_M=tile.groups,
        BLOCK_N=tile.groups,
        BLOCK_K=tile.depth,
        HAS_START=kv_start is not None,
        HAS_SOFTCAP=softcap > 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return masses


@triton.jit
def _logits(
    p_q,
    p_k,
    offs_m,
    offs_n,
    first_query,
    q_length,
    kv_length,
    stride_qs,
    stride_qd,
    stride_ks,
    stride_kd,
    to_log2,
    softcap,
    future,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Logits of a tile of groups in log2 units.

    `offs_m` and `offs_n` are the first token of each group, as indices into the call's queries and keys. Queries
    outside `first_query` to `q_length - 1` and keys from `kv_length` on are zeros. `to_log2` turns the sum over the
    antidiagonal of each query group into a mean.
    """
    PARTS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)  # [BM, BN]
    for i in tl.range(0, STRIDE * PARTS):
        t = i // PARTS
        offs_d = (i % PARTS) * BLOCK_K + tl.arange(0, BLOCK_K)  # [BK]
        query = offs_m + STRIDE - 1 - t  # [BM]
        key = offs_n + t  # [BN]
        mask_m = (query >= first_query) & (query < q_length)  # [BM]
        p_qt = p_q + query.to(tl.int64)[:, None] * stride_qs + offs_d.to(tl.int64)[None, :] * stride_qd  # [BM, BK]
        p_kt = p_k + key.to(tl.int64)[None, :] * stride_ks + offs_d.to(tl.int64)[:, None] * stride_kd  # [BK, BN]
        b_q = tl.load(p_qt, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)  # [BM, BK]
        b_k = tl.load(p_kt, mask=(key < kv_length)[None, :] & (offs_d < D)[:, None], other=0.0)  # [BK, BN]
        s = tl.dot(b_q, b_k, s, input_precision="ieee")  # [BM, BN]
    s = s * to_log2[:, None]  # [BM, BN]
    if HAS_SOFTCAP:
        s = softcap_logits(s, 1.0, softcap * LOG2_E)  # [BM, BN]
    return tl.where(future, -float("inf"), s)


@jit(["num_tiles", "q_length", "kv_length", "q_start", "first_block", "num_query_blocks", "num_key_blocks"])
def _antidiagonal_kernel(
    q,
    k,
    masses,
    kv_start,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    heads,
    kv_heads,
    num_tiles,
    q_length,
    kv_length,
    q_start,
    first_block,
    num_query_blocks,
    num_key_blocks,
    scale,
    softcap,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    # 1. The tile: query groups of a head, in whole blocks.
    PER_BLOCK: tl.constexpr = BLOCK // STRIDE  # groups of a block
    ROWS: tl.constexpr = BLOCK_M // PER_BLOCK  # query blocks of a tile
    COLS: tl.constexpr = BLOCK_N // PER_BLOCK  # key blocks of a tile
    group = heads // kv_heads
    pid = tl.program_id(0)
    i_g = pid % group
    pid = pid // group
    i_tile = num_tiles - 1 - pid % num_tiles  # the longest first
    pid = pid // num_tiles
    i_hk = pid % kv_heads
    i_b = pid // kv_heads
    i_h = i_hk * group + i_g

    # 2. The groups, and the queries of each that are real.
    start = 0
    if HAS_START:
        start = tl.load(kv_start + i_b).to(tl.int32)
    length = kv_length - start
    first_query = tl.maximum(q_start - start, 0)  # within the row, like every position below
    tile_block = first_query // BLOCK + first_block + i_tile * ROWS
    offs_a = tile_block * PER_BLOCK + tl.arange(0, BLOCK_M)  # [BM]; query groups
    first_real = tl.maximum(offs_a * STRIDE, first_query)  # [BM]
    real = tl.maximum(tl.minimum(offs_a * STRIDE + STRIDE, length) - first_real, 0)  # [BM]
    to_log2 = scale * LOG2_E / tl.maximum(real, 1).to(tl.float32)  # [BM]

    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    p_k = k + i_b.to(tl.int64) * stride_kb + i_hk.to(tl.int64) * stride_kh
    offs_m = offs_a * STRIDE + start - q_start  # [BM]
    first_m = tl.maximum(start - q_start, 0)
    end_key = tl.minimum((tile_block + ROWS) * PER_BLOCK, tl.cdiv(length, STRIDE))  # key groups that the tile sees
    end_key = tl.where(tile_block * BLOCK < length, end_key, 0)  # nothing after the row's end

    # 3. Maximum and sum of each query group.
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)  # [BM]
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)  # [BM]
    for n in range(0, end_key, BLOCK_N):
        offs_c = n + tl.arange(0, BLOCK_N)  # [BN]
        # [BM, BN]
        s = _logits(p_q, p_k, offs_m, offs_c * STRIDE + start, first_m, q_length, kv_length, stride_qs, stride_qd,
                    stride_ks, stride_kd, to_log2, softcap, offs_c[None, :] > offs_a[:, None],
                    D, STRIDE, BLOCK_M, BLOCK_N, BLOCK_K, HAS_SOFTCAP)  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(s, 1))  # [BM]; finite from the first tile on: every group sees key group 0
        l_i = l_i * tl.math.exp2(m_i - m_new) + tl.sum(tl.math.exp2(s - m_new[:, None]), 1)  # [BM]
        m_i = m_new

    # 4. Sums over blocks.
    # A group's share of its block: one over the number of groups of the block that hold a real query.
    block_a = offs_a // PER_BLOCK * BLOCK  # [BM]
    block_first = tl.maximum(block_a, first_query) // STRIDE  # [BM]
    block_end = tl.cdiv(tl.minimum(block_a + BLOCK, length), STRIDE)  # [BM]
    share = tl.where(real > 0, 1.0 / (l_i * tl.maximum(block_end - block_first, 1).to(tl.float32)), 0.0)  # [BM]

    offs_i = i_tile * ROWS + tl.arange(0, ROWS)  # [ROWS]; query blocks, within the launch
    p_out = masses + (i_b * heads + i_h).to(tl.int64) * num_query_blocks * num_key_blocks
    for n in range(0, end_key, BLOCK_N):
        offs_c = n + tl.arange(0, BLOCK_N)  # [BN]
        # [BM, BN]
        s = _logits(p_q, p_k, offs_m, offs_c * STRIDE + start, first_m, q_length, kv_length, stride_qs, stride_qd,
                    stride_ks, stride_kd, to_log2, softcap, offs_c[None, :] > offs_a[:, None],
                    D, STRIDE, BLOCK_M, BLOCK_N, BLOCK_K, HAS_SOFTCAP)  # fmt: skip
        p = tl.math.exp2(s - m_i[:, None]) * share[:, None]  # [BM, BN]
        sums = tl.sum(tl.reshape(p, (BLOCK_M, COLS, PER_BLOCK)), 2)  # [BM, COLS]
        sums = tl.sum(tl.reshape(sums, (ROWS, PER_BLOCK, COLS)), 1)  # [ROWS, COLS]
        offs_j = n // PER_BLOCK + tl.arange(0, COLS)  # [COLS]
        inside = (offs_i < num_query_blocks)[:, None] & (offs_j < num_key_blocks)[None, :]  # [ROWS, COLS]
        tl.store(p_out + offs_i.to(tl.int64)[:, None] * num_key_blocks + offs_j[None, :], sums, mask=inside)
