"""Triton kernels of the pages' statistics and scores.

Scores are products on tensor cores. `max(q*low, q*high)` is `q*high` if q is positive, else `q*low`, so a bound is the
sum of two products. Every page is read once for all query heads of its KV head.
"""

import torch
import triton
import triton.language as tl

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import block_of, by_row, given, launch_op, precision_of, rows_in_one_piece
from sparse_patch.ops.selection.page_statistics.pages import pages_of


def refresh(call: AttentionCall, tensors: list[torch.Tensor], tokens: int, page_size: int, offset: int) -> None:
    """Compute, in place, the pages of each row that hold one of its last `tokens` tokens: bounds or means."""
    first, *second = tensors
    end = call.kv_length if call.kv_end is None else 0
    if second:
        refresh_bounds(first, second[0], call.k, call.kv_start, call.kv_end, end, tokens, page_size, offset)
    else:
        refresh_means(first, call.k, call.kv_start, call.kv_end, end, tokens, page_size, offset)


@launch_op("refresh_page_bounds", mutates_args=("low", "high"))
def refresh_bounds(
    low: torch.Tensor,
    high: torch.Tensor,
    k: torch.Tensor,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    end: int,
    tokens: int,
    page_size: int,
    offset: int,
) -> None:
    """The kernel's launch; `end` is the number of valid keys if `kv_end` is None."""
    _refresh(low, high, k, kv_start, kv_end, end, tokens, page_size, offset)


@launch_op("refresh_page_means", mutates_args=("means",))
def refresh_means(
    means: torch.Tensor,
    k: torch.Tensor,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    end: int,
    tokens: int,
    page_size: int,
    offset: int,
) -> None:
    """As `refresh_bounds`."""
    _refresh(means, None, k, kv_start, kv_end, end, tokens, page_size, offset)


def _refresh(
    first: torch.Tensor,
    second: torch.Tensor | None,
    k: torch.Tensor,
    kv_start: torch.Tensor | None,
    kv_end: torch.Tensor | None,
    end: int,
    tokens: int,
    page_size: int,
    offset: int,
) -> None:
    k = rows_in_one_piece(k)
    batch, heads, _, head_dim = k.shape
    rows, block_d = min(32, triton.next_power_of_2(page_size)), triton.next_power_of_2(head_dim)
    _refresh_kernel[(min(pages_of(tokens, page_size), first.shape[2]), batch * heads)](
        k,
        by_row(kv_start, k),
        given(kv_end, k),
        first,
        given(second, first),
        *k.stride()[:3],
        *first.stride(),
        *given(second, first).stride(),
        heads,
        end,
        tokens,
        offset,
        D=head_dim,
        BLOCK_D=block_d,
        P=page_size,
        ROWS=rows,
        HAS_START=kv_start is not None,
        HAS_END=kv_end is not None,
        BOUNDS=second is not None,
        num_warps=min(max(rows * block_d // 1024, 1), 4),
    )


@jit(["end", "tokens", "offset"])
def _refresh_kernel(
    k, kv_start, kv_end, first, second, stride_kb, stride_kh, stride_ks,
    stride_1b, stride_1h, stride_1n, stride_1d, stride_2b, stride_2h, stride_2n, stride_2d,
    heads, end, tokens, offset,
    D: tl.constexpr, BLOCK_D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, HAS_START: tl.constexpr,
    HAS_END: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    start = 0
    if HAS_START:
        start = tl.load(kv_start + i_b).to(tl.int32)
    if HAS_END:
        end = tl.load(kv_end).to(tl.int32)
    page = tl.maximum(end - start - tokens - offset, 0) // P + i_t
    begin = start + offset + page * P
    stop = tl.minimum(begin + P, end)
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    p_k = k + i_b * stride_kb + i_h * stride_kh
    if BOUNDS:
        low = tl.full([BLOCK_D], float("inf"), dtype=tl.float32)  # [BD]
        high = tl.full([BLOCK_D], -float("inf"), dtype=tl.float32)  # [BD]
    else:
        low = tl.zeros([BLOCK_D], dtype=tl.float32)  # [BD]
        high = low
    for j in tl.range(begin, stop, ROWS):
        offs_s = j + tl.arange(0, ROWS)  # [ROWS]
        real = (offs_s < stop)[:, None]  # [ROWS, 1]
        mask = real & (offs_d < D)[None, :]  # [ROWS, BD]
        # [ROWS, BD]
        b_k = tl.load(p_k + offs_s.to(tl.int64)[:, None] * stride_ks + offs_d[None, :], mask=mask, other=0.0)
        b_k = b_k.to(tl.float32)  # [ROWS, BD]
        if BOUNDS:
            low = tl.minimum(low, tl.min(tl.where(real, b_k, float("inf")), 0))  # [BD]
            high = tl.maximum(high, tl.max(tl.where(real, b_k, -float("inf")), 0))  # [BD]
        else:
            low += tl.sum(b_k, 0)  # [BD]
    if not BOUNDS:
        low = low / tl.maximum(stop - begin, 1).to(tl.float32)  # [BD]
    i_n, offs_d = page.to(tl.int64), offs_d.to(tl.int64)
    mask = offs_d < tl.where(begin < end, D, 0)  # [BD]; a page without a key may lie past the end of the tensors
    p_first = first + i_b * stride_1b + i_h * stride_1h + i_n * stride_1n + offs_d * stride_1d  # [BD]
    tl.store(p_first, low.to(first.dtype.element_ty), mask=mask)
    if BOUNDS:
        p_second = second + i_b * stride_2b + i_h * stride_2h + i_n * stride_2n + offs_d * stride_2d  # [BD]
        tl.store(p_second, high.to(second.dtype.element_ty), mask=mask)


def bound_scores(
    q: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    group: str | None = None,
) -> torch.Tensor:
    """See `ops.selection.page_statistics`."""
    return score_pages(q, high, low, lengths, page_size, 0, group)


def mean_scores(
    q: torch.Tensor,
    means: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    offset: int = 0,
    group: str | None = None,
) -> torch.Tensor:
    """See `ops.selection.page_statistics`."""
    return score_pages(q, means, None, lengths, page_size, offset, group)


def _outputs(q: torch.Tensor, high: torch.Tensor, group: str | None) -> torch.Tensor:
    lists = q.shape[1] if group is None else high.shape[1]
    return q.new_empty(len(q), lists, high.shape[2], dtype=torch.float32)


@launch_op("page_statistics_scores", _outputs)
def score_pages(
    q: torch.Tensor,
    high: torch.Tensor,
    low: torch.Tensor | None,
    lengths: torch.Tensor,
    page_size: int,
    offset: int,
    group: str | None,
) -> torch.Tensor:
    """The kernel's launch: bounds, or products with `high` if `low` is None."""
    q = rows_in_one_piece(q)
    if high.stride(-1) != 1 or (low is not None and low.stride() != high.stride()):
        high, low = high.contiguous(), None if low is None else low.contiguous()
    scores = _outputs(q, high, group)
    batch, heads, head_dim = q.shape
    kv_heads, pages = high.shape[1:3]
    block_d = block_of(head_dim)
    block_n = max(16, min(64, 16384 // (block_d * high.element_size())))
    _score_kernel[(triton.cdiv(pages, block_n), batch * kv_heads)](
        q,
        high,
        given(low, high),
        lengths,
        scores,
        lengths.stride(0),
        *q.stride()[:2],
        *high.stride()[:3],
        kv_heads,
        pages,
        offset,
        D=head_dim,
        BLOCK_D=block_d,
        GROUP=heads // kv_heads,
        BLOCK_G=block_of(heads // kv_heads),
        BLOCK_N=block_n,
        P=page_size,
        BOUNDS=low is not None,
        OF_GROUP=group or "",
        PRECISION=precision_of(q.dtype),
        num_warps=4,
    )
    return scores


@jit(["pages", "offset"])
def _score_kernel(
    q, high, low, lengths, scores, stride_length, stride_qb, stride_qh, stride_b, stride_h, stride_n,
    kv_heads, pages, offset,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    P: tl.constexpr, BOUNDS: tl.constexpr, OF_GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // kv_heads).to(tl.int64), (i_bh % kv_heads).to(tl.int64)
    length = tl.load(lengths + i_b * stride_length).to(tl.int32)
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    offs_g = tl.arange(0, BLOCK_G)  # [BG]
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    real = (offs_n < pages) & (offset + offs_n * P < length)  # [BN]
    p_q = q + i_b * stride_qb + (i_h * GROUP + offs_g)[None, :] * stride_qh + offs_d[:, None]  # [BD, BG]
    b_q = tl.load(p_q, mask=(offs_g < GROUP)[None, :] & (offs_d < D)[:, None], other=0.0)  # [BD, BG]
    p_pages = i_b * stride_b + i_h * stride_h + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :]  # [BN, BD]
    mask = real[:, None] & (offs_d < D)[None, :]  # [BN, BD]
    b_high = tl.load(high + p_pages, mask=mask, other=0.0)  # [BN, BD]
    if BOUNDS:
        b_low = tl.load(low + p_pages, mask=mask, other=0.0)  # [BN, BD]
        s = tl.dot(b_high, tl.maximum(b_q, 0.0).to(b_q.dtype), input_precision=PRECISION)  # [BN, BG]
        s = tl.dot(b_low, tl.minimum(b_q, 0.0).to(b_q.dtype), s, input_precision=PRECISION)  # [BN, BG]
    else:
        s = tl.dot(b_high, b_q, input_precision=PRECISION)  # [BN, BG]
    mask_g = (offs_g < GROUP)[None, :]  # [1, BG]
    if OF_GROUP == "":
        s = tl.where(real[:, None], s, -float("inf"))  # [BN, BG]
        p_scores = scores + ((i_bh.to(tl.int64) * GROUP + offs_g)[None, :] * pages + offs_n[:, None])  # [BN, BG]
        tl.store(p_scores, s, mask=mask_g & (offs_n < pages)[:, None])
    else:
        if OF_GROUP == "max":
            of_group = tl.max(tl.where(mask_g, s, -float("inf")), 1)  # [BN]
        else:
            of_group = tl.sum(tl.where(mask_g, s, 0.0), 1) / (GROUP if OF_GROUP == "mean" else 1)  # [BN]
        of_group = tl.where(real, of_group, -float("inf"))  # [BN]
        tl.store(scores + i_bh.to(tl.int64) * pages + offs_n, of_group, mask=offs_n < pages)
