"""Triton kernel that counts the pairs of lists of pages: one program per list, for all rows of the batch.

The queries of a row see `length - queries + 1` to `length` keys. The first `x` of those numbers, `1 ... x`, give a page
of P keys that begins at 0 `_pairs(x)` pairs: a triangle while the page fills, then P pairs each. So a page's pairs are
the difference of two such sums, whatever the number of queries.
"""

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import given, launch_op


@launch_op("add_page_pairs", mutates_args=("total",))
def add_page_pairs(
    total: torch.Tensor,
    lengths: torch.Tensor,
    pages: torch.Tensor | None,
    counts: torch.Tensor | None,
    page_size: int,
    q_length: int,
) -> None:
    """Add the pairs of every query head, summed over the batch, to `total`, int64 `[Hq]`.

    The other arguments are the attributes of a `PagePlan`; without pages and counts every key is read.
    """
    heads, batch = len(total), len(lengths)
    every = pages is None or counts is None
    listed, number = given(pages, lengths), given(counts, lengths)
    lists, capacity = (1, 1) if pages is None else pages.shape[1:]
    block = min(4096, max(16, triton.next_power_of_2(capacity)))
    _pairs_kernel[(lists,)](
        total,
        lengths,
        listed,
        number,
        total.stride(0),
        lengths.stride(0),
        (0, 0, 0) if every else listed.stride(),
        (0, 0) if every else number.stride(),
        batch,
        q_length,
        GROUP=heads // lists,
        BLOCK_G=triton.next_power_of_2(heads // lists),
        BLOCK=block,
        P=page_size,
        EVERY=every,
        AS_COUNTED=not every and page_size == 1 and q_length == 1,
        num_warps=max(1, min(block // 256, 16)),
    )


@triton.jit
def _pairs(x, page):
    """Pairs of queries that see 1, 2, ... x keys with a page of `page` keys, int64."""
    inside = tl.minimum(tl.maximum(x, 0), page).to(tl.int64)
    return inside * (inside + 1) // 2 + tl.maximum(x - page, 0).to(tl.int64) * page


@jit(["batch", "q_length"])
def _pairs_kernel(
    total, lengths, pages, counts, stride_t, stride_length, page_strides, count_strides, batch, q_length,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr, EVERY: tl.constexpr,
    AS_COUNTED: tl.constexpr,
):  # fmt: skip
    i_l = tl.program_id(0).to(tl.int64)
    stride_pb, stride_pl, stride_pk = page_strides
    stride_cb, stride_cl = count_strides
    pairs = tl.zeros([1], dtype=tl.int64)  # [1]
    for b in tl.range(0, batch):
        i_b = tl.cast(b, tl.int64)
        length = tl.load(lengths + i_b * stride_length).to(tl.int32)
        if EVERY:
            pairs += _pairs(length, length) - _pairs(length - q_length, length)  # [1]
        elif AS_COUNTED:  # every listed token is one that the query sees
            pairs += tl.load(counts + i_b * stride_cb + i_l * stride_cl)  # [1]
        else:
            count = tl.load(counts + i_b * stride_cb + i_l * stride_cl)
            for i in tl.range(0, count, BLOCK):
                offs = i + tl.arange(0, BLOCK)  # [BLOCK]
                p_pages = pages + i_b * stride_pb + i_l * stride_pl + offs.to(tl.int64) * stride_pk  # [BLOCK]
                seen = length - tl.load(p_pages, mask=offs < count, other=0) * P  # [BLOCK]; by the last query
                of_pages = _pairs(seen, P) - _pairs(seen - q_length, P)  # [BLOCK]
                pairs += tl.sum(tl.where(offs < count, of_pages, 0), 0)  # [1]
    offs_g = tl.arange(0, BLOCK_G)  # [BG]
    p_total = total + (i_l * GROUP + offs_g) * stride_t  # [BG]
    mask = offs_g < GROUP  # [BG]
    tl.store(p_total, tl.load(p_total, mask=mask, other=0) + pairs, mask=mask)
