"""Triton kernel that decides: exact reference region, estimates of the candidates, bits.

A program holds a few query tiles of one head and loads them once. Exact products with the reference region give every
query its limit; then the candidates are read as int8 codes. Each of their products costs only one integer maximum. Four
threads of a tensor core instruction share a row. Each of them owns the keys of a block with one `(n % 8) // 2`, so the
maximum over these keys stays inside a thread. An estimate, one conversion and one comparison follow for each thread,
row and block. The results are collected as bits of one word per thread and row. Rows and threads are combined once per
32 key blocks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import by_row, launch_op
from sparse_patch.kernels.pieces import LN2, LOG2_E, add_to_exp_sum, softcap_logits, tiles_of
from sparse_patch.ops.selection.low_bit_scores.params import DENSE_BELOW, QUERY_TILE, SEGMENT
from sparse_patch.ops.selection.low_bit_scores.triton.codes import EVEN, scale_of, smoothed, to_codes

_MEAN_LIMIT: tl.constexpr = tl.constexpr(536870912.0)  # bound of the mean query's term: it stays an int32


@dataclass(frozen=True)
class Tile:
    """The tiling of the deciding kernel.

    Attributes:
        query_tiles: tiles of 64 queries per program; with more tiles, the codes of the keys are read less often.
        keys: keys per step over the candidates; 32 to 1024.
        region_keys: keys per step over the reference region.
        num_warps: warps per program, a multiple of 4.
        num_stages: depth of the pipeline over the candidates.
        registers: most registers per thread, so that two programs share a multiprocessor: while one multiplies, the
            other takes maxima. None if unlimited.
    """

    query_tiles: int
    keys: int
    region_keys: int
    num_warps: int
    num_stages: int
    registers: int | None = None


def tile_of(head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile for a head size and dtype: a multiple of 64 queries per warp group, as Hopper multiplies them."""
    if dtype == torch.float32:
        return Tile(1, 128, 16, 8, 2)
    return Tile(2, 128, 32, 8, 3, registers=128) if head_dim <= 128 else Tile(1, 128, 32, 4, 2)


def _outputs(q: torch.Tensor, num_tiles: int, num_words: int) -> torch.Tensor:
    return q.new_empty(*q.shape[:2], num_tiles, num_words, dtype=torch.int32)


@launch_op("decide_blocks", _outputs)
def decide_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    mean_term: torch.Tensor,
    mean_k: torch.Tensor,
    mean_q: torch.Tensor | None,
    tau: torch.Tensor,
    kv_start: torch.Tensor | None,
    scale: float,
    softcap: float,
    q_start: int,
    local_window: int,
    num_tiles: int,
    num_words: int,
) -> torch.Tensor:
    """The deciding kernel's launch; arguments as in `AttentionCall` and `quantise_keys`, softcap 0 for none.

    Returns:
        The map, int32 `[B, Hq, num_tiles, num_words]`.
    """
    batch, heads, q_length, head_dim = q.shape
    kv_heads, kv_length = k.shape[1:3]
    words = _outputs(q, num_tiles, num_words)
    tile = tile_of(head_dim, q.dtype)
    programs = triton.cdiv(num_tiles, tile.query_tiles)
    _decide_kernel[(batch * heads * programs,)](
        q,
        k,
        tiles_of(codes, tile.keys),
        scales,
        mean_term,
        mean_k.contiguous(),
        by_row(mean_q, mean_k),
        tau.contiguous(),
        words,
        by_row(kv_start, words),
        q.stride(),
        k.stride(),
        heads,
        kv_heads,
        programs,
        num_tiles,
        num_words,
        q_length,
        kv_length,
        q_start,
        codes.shape[2],
        scale,
        softcap,
        LARGEST=127 if mean_q is None else 7,
        WINDOW=local_window,
        SEGMENT=SEGMENT,
        DENSE=DENSE_BELOW,
        D=head_dim,
        BLOCK_D=codes.shape[-1],
        TILE=QUERY_TILE,
        TILES=tile.query_tiles,
        BLOCK_N=tile.keys,
        REGION_N=tile.region_keys,
        HAS_START=kv_start is not None,
        HAS_MEAN=mean_q is not None,
        HAS_SOFTCAP=softcap > 0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.registers,
    )
    return words


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _lowest(n):
    """The lowest `n` bits of a word, int32; `n` may lie outside 0 to 32."""
    n = tl.minimum(tl.maximum(n, 0), 32)
    return tl.where(n == 32, -1, (tl.full(n.shape, 1, tl.int32) << (n & 31)) - 1)


@triton.jit
def _as_float(x):
    """Integers of less than 2 ** 22 as float32, exactly; a conversion would be a quarter as fast."""
    return (x + 0x4B400000).to(tl.float32, bitcast=True) - EVEN


@triton.jit
def _bounds(tile, length, WINDOW: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr):
    """Key blocks that query tiles see, 0 for tiles after the row's end, and their first local block."""
    visible = tl.minimum((tile + 1) * (TILE // 32), (length + 31) // 32)
    visible = tl.where(tile * TILE < length, visible, 0)
    segments = tl.maximum(visible - 1 - WINDOW // 32, 0) // (SEGMENT // 32)
    return visible, 1 + segments * (SEGMENT // 32)


@jit(["programs", "num_tiles", "num_words", "q_length", "kv_length", "q_start"])
def _decide_kernel(
    q,
    k,
    codes_desc,
    scales,
    mean_term,
    mean_k,
    mean_q,
    tau,
    words,
    kv_start,
    q_strides,
    k_strides,
    heads,
    kv_heads,
    programs,
    num_tiles,
    num_words,
    q_length,
    kv_length,
    q_start,
    slots,
    scale,
    softcap,
    LARGEST: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENT: tl.constexpr,
    DENSE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REGION_N: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    stride_qb, stride_qh, stride_qs, stride_qd = q_strides
    stride_kb, stride_kh, stride_ks, stride_kd = k_strides
    # 1. The tile: query tiles of a head, and the blocks that each sees.
    BLOCK_M: tl.constexpr = TILES * TILE
    BLOCKS: tl.constexpr = BLOCK_N // 32  # key blocks of a step
    SINK_STEPS: tl.constexpr = (32 + REGION_N - 1) // REGION_N
    LANES: tl.constexpr = 4 if HAS_MEAN else 1  # scales of a key block
    group = heads // kv_heads
    pid = tl.program_id(0)
    i_g = pid % group
    pid = pid // group
    i_first = (programs - 1 - pid % programs) * TILES  # the longest first
    pid = pid // programs
    i_hk = pid % kv_heads
    i_b = pid // kv_heads
    i_h = i_hk * group + i_g
    i_bh = (i_b * heads + i_h).to(tl.int64)
    i_bk = (i_b * kv_heads + i_hk).to(tl.int64)

    start = 0
    if HAS_START:
        start = tl.load(kv_start + i_b).to(tl.int32)
    length = kv_length - start
    first_tile = tl.maximum(q_start - start, 0) // TILE + i_first
    tiles = first_tile + tl.arange(0, TILES)  # [TILES]
    offs_m = first_tile * TILE + tl.arange(0, BLOCK_M)  # [BM]; positions within the row
    visible, local = _bounds(tiles, length, WINDOW, SEGMENT, TILE)  # [TILES]
    _, local_m = _bounds(offs_m // TILE, length, WINDOW, SEGMENT, TILE)  # [BM]
    b_tau = tl.load(tau + i_h)
    dense = b_tau < DENSE
    local = tl.where(dense, 1, local)  # [TILES]
    end = tl.where(dense, 0, tl.max(visible, 0) * 32)  # end of the reference region; a dense head needs none
    low = tl.min(tl.where(visible > 0, local, num_words * 32), 0) * 32

    # 2. Queries.
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    index = offs_m + start - q_start  # [BM]
    real = (index >= tl.maximum(start - q_start, 0)) & (index < q_length)  # [BM]
    mask_q = real[:, None] & (offs_d < D)[None, :]  # [BM, BD]
    p_q = q + i_b.to(tl.int64) * stride_qb + i_h.to(tl.int64) * stride_qh
    p_q = p_q + index.to(tl.int64)[:, None] * stride_qs + offs_d.to(tl.int64)[None, :] * stride_qd  # [BM, BD]
    b_q = tl.load(p_q, mask=mask_q, other=0.0)  # [BM, BD]
    dtype: tl.constexpr = b_q.dtype
    mean = tl.load(mean_k + i_bk * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)  # [BD]
    taken_off = tl.zeros([BLOCK_M], dtype=tl.float32)  # [BM]
    if HAS_SOFTCAP:
        taken_off = tl.sum(b_q.to(tl.float32) * mean[None, :], 1)  # [BM]

    # 3. The LSE of each query over the reference region, with exact products.
    to_log2 = LOG2_E * (1.0 if HAS_SOFTCAP else scale)
    p_k = k + i_b.to(tl.int64) * stride_kb + i_hk.to(tl.int64) * stride_kh
    m_i = tl.full([BLOCK_M], -float("inf"), dtype=tl.float32)  # [BM]
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)  # [BM]
    for t in tl.range(0, tl.where(end > 0, SINK_STEPS + tl.cdiv(tl.maximum(end - low, 0), REGION_N), 0)):
        in_sink = t < SINK_STEPS  # the sink comes first, then the local keys
        offs_n = tl.where(in_sink, t * REGION_N, low + (t - SINK_STEPS) * REGION_N) + tl.arange(0, REGION_N)  # [RN]
        b_k = smoothed(p_k, offs_n + start, offs_n < length, mean, stride_ks, stride_kd, D, BLOCK_D)  # [RN, BD]
        s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, RN]
        if HAS_SOFTCAP:
            s = softcap_logits(s + taken_off[:, None], scale, softcap)  # [BM, RN]
        s = s * to_log2  # [BM, RN]
        from_n = tl.where(in_sink, 0, local_m * 32)  # [BM]
        until_n = tl.where(in_sink, 31, offs_m)  # [BM]
        # [BM, RN]
        seen = (offs_n[None, :] >= from_n[:, None]) & (offs_n[None, :] <= tl.minimum(until_n, offs_m)[:, None])
        m_i, l_i = add_to_exp_sum(m_i, l_i, tl.where(seen, s, -float("inf")))  # [BM], [BM]

    # 4. The limit: what an estimated product must exceed.
    # [BM]
    limit = m_i + tl.math.log2(tl.maximum(l_i, 1.0)) + tl.math.log2(tl.maximum(b_tau, DENSE))  # a sum is at least 1
    limit = limit * LN2  # [BM]
    if HAS_SOFTCAP:
        x = tl.maximum(limit / softcap, -1.0)  # [BM]
        uncapped = (softcap * 0.5) * tl.math.log(tl.maximum(1.0 + x, 1e-37) / tl.where(x < 1.0, 1.0 - x, 1.0))  # [BM]
        limit = tl.where(x < 1.0, uncapped, float("inf"))  # [BM]
    limit = limit / scale - taken_off  # [BM]
    limit = tl.where(real, limit, float("inf"))  # [BM]

    # 5. Codes of the queries.
    if HAS_MEAN:
        b_mean = tl.load(mean_q + i_bh * D + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)  # [BD]
        x_q = tl.where(mask_q, b_q.to(tl.float32) - b_mean[None, :], 0.0).to(dtype).to(tl.float32)  # [BM, BD]
        # [BM / 16, 8]
        pairs = tl.max(tl.reshape(tl.max(tl.abs(x_q), 1), (BLOCK_M // 16, 2, 8)), 1)  # queries r and r + 8 of 16
        scale_q = tl.broadcast_to(scale_of(pairs, LARGEST, dtype)[:, None, :], (BLOCK_M // 16, 2, 8))  # [BM / 16, 2, 8]
        scale_q = tl.reshape(scale_q, (BLOCK_M,))  # [BM]
        limit = limit.to(dtype).to(tl.float32)  # [BM]
    else:
        x_q = b_q.to(tl.float32)  # [BM, BD]
        scale_q = scale_of(tl.max(tl.abs(x_q), 1), LARGEST, tl.float32)  # [BM]
        limit = limit / scale_q  # [BM]
    codes_q = to_codes(x_q, tl.broadcast_to(scale_q[:, None], (BLOCK_M, BLOCK_D)), LARGEST)  # [BM, BD]

    # 6. The candidates: estimates, and bits of those above the limit.
    offs_j = tl.arange(0, BLOCKS)  # [BLOCKS]
    offs_l = tl.arange(0, LANES)  # [LANES]
    p_scales = scales + i_bk * (slots // 32 * LANES) + offs_j[:, None] * LANES + offs_l[None, :]  # [BLOCKS, LANES]
    p_words = words + (i_bh * num_tiles + i_first + tl.arange(0, TILES)) * num_words  # [TILES]
    inside = i_first + tl.arange(0, TILES) < num_tiles  # [TILES]
    last = tl.where(dense, 1, tl.max(tl.where(visible > 0, local, 0), 0))  # candidates lie before this block
    steps = tl.where(last > 1, tl.cdiv(last, BLOCKS), 0)
    found = tl.zeros([BLOCK_M, 4], dtype=tl.int32)  # [BM, 4]
    # [BLOCKS, LANES]
    scale_next = tl.load(p_scales)  # one step ahead: a load whose result is needed at once stalls the pipeline
    for c in tl.range(0, steps):
        b_k = codes_desc.load([i_b, i_hk, c * BLOCK_N, 0]).reshape(BLOCK_N, BLOCK_D)  # [BN, BD]
        scale_k = scale_next.to(tl.float32)  # [BLOCKS, LANES]
        scale_next = tl.load(p_scales + tl.minimum(c + 1, steps - 1) * (BLOCKS * LANES))  # [BLOCKS, LANES]
        s = tl.dot(codes_q, tl.trans(b_k), out_dtype=tl.int32)  # [BM, BN]
        if HAS_MEAN:
            term = tl.load(mean_term + i_bh * slots + c * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.float32)  # [BN]
            term = term[None, :] / scale_q[:, None]  # [BM, BN]
            term = (tl.minimum(tl.maximum(term, -_MEAN_LIMIT), _MEAN_LIMIT) + EVEN) - EVEN  # [BM, BN]
            s += term.to(tl.int32)  # [BM, BN]
        # Thread t of a row holds key 8a + 2t + e of a block.
        largest = tl.max(tl.max(tl.reshape(s, (BLOCK_M, BLOCKS, 4, 4, 2)), 4), 2)  # [BM, BLOCKS, 4]
        if HAS_MEAN:
            product = (scale_q[:, None, None] * scale_k[None, :, :]).to(dtype).to(tl.float32)  # [BM, BLOCKS, LANES]
            # [BM, BLOCKS, 4]
            estimate = (largest.to(tl.float32).to(dtype).to(tl.float32) * product).to(dtype).to(tl.float32)
        else:
            estimate = _as_float(largest) * scale_k[None, :, :]  # [BM, BLOCKS, 4]; a product is at most 127 * 127 * 256
        bit = tl.full([BLOCKS], 1, tl.int32) << (c * BLOCKS % 32 + offs_j)  # [BLOCKS]
        found = found | tl.reduce(tl.where(estimate > limit[:, None, None], bit[None, :, None], 0), 1, _or)  # [BM, 4]
        if ((c + 1) * BLOCKS % 32 == 0) | (c == steps - 1):
            base = c * BLOCKS // 32 * 32
            below = _lowest(local - base)  # [TILES]
            kept = tl.reduce(tl.reshape(found, (TILES, TILE * 4)), 1, _or) & below  # [TILES]
            kept = kept | ~below | (base == 0).to(tl.int32)  # [TILES]
            tl.store(p_words + base // 32, kept & _lowest(visible - base), mask=inside)
            found = tl.zeros([BLOCK_M, 4], dtype=tl.int32)  # [BM, 4]

    # 7. The words after the candidates: only local blocks.
    done = tl.cdiv(steps * BLOCKS, 32)
    for w in tl.range(done, num_words, 32):
        base = (w + tl.arange(0, 32))[None, :] * 32  # [1, 32]
        # [TILES, 32]
        kept = (~_lowest(local[:, None] - base) | (base == 0).to(tl.int32)) & _lowest(visible[:, None] - base)
        there = inside[:, None] & (w + tl.arange(0, 32) < num_words)[None, :]  # [TILES, 32]
        tl.store(p_words[:, None] + w + tl.arange(0, 32)[None, :], kept, mask=there)
