"""The ops that attend, with tensors for each."""

from dataclasses import replace

import torch
from torch import Tensor

from builders.op import Op, Size, Tensors, as_call, without
from sparse_patch.ops.attention import block_sparse, dense, page_decode, span, span_ring, token_blocks
from sparse_patch.plans import BlockGrid, BlockPlan, PagePlan, SpanPlan, TokenBlockPlan


def block_plan_of(x: Tensors) -> BlockPlan:
    return BlockPlan(x["indices"], x["counts"], BlockGrid.of(as_call(x), 16), x["columns"], x["column_counts"])


def make_block_sparse(size: Size) -> Tensors:
    x = size.call(30, 12)
    grid = BlockGrid.of(as_call(x), 16)
    blocks = torch.rand(size.batch, 2, grid.num_query_blocks, grid.num_key_blocks) < 0.5
    columns = torch.randperm(30)[:9].expand(size.batch, 2, -1)
    plan = BlockPlan.from_blocks(blocks, grid, columns)
    assert plan.columns is not None and plan.column_counts is not None
    lists = {"indices": plan.indices, "counts": plan.counts, "columns": plan.columns}
    return {**x, **lists, "column_counts": plan.column_counts}


def run_block_sparse(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    out, lse, _ = block_sparse.attend(as_call(x), block_plan_of(x), backend, return_lse=True)
    assert lse is not None
    return out, lse


TILE = 8  # queries of a list


def make_token_blocks(size: Size) -> Tensors:
    x = size.call(150, 6, heads=(2, 1))
    grid = BlockGrid.of(as_call(x), 64)
    chosen = torch.zeros(size.batch, 1, grid.num_query_blocks, 64, grid.num_key_blocks, dtype=torch.bool)
    chosen[..., 1] = grid.query_block_ids[:, None, :, None] > 1
    chosen &= torch.rand(chosen.shape) < 0.5
    entries, counts = TokenBlockPlan.packed(chosen, grid.query_is_real, TILE)
    return {**x, "entries": entries, "counts": counts}


def run_token_blocks(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    call = as_call(x)
    plan = TokenBlockPlan(x["entries"], x["counts"], BlockGrid.of(call, 64), TILE, call.q.shape[1], 1, 0, 0)
    out, lse, _ = token_blocks.attend(call, plan, backend, return_lse=True)
    assert lse is not None
    return out, lse


def make_page_decode(size: Size) -> Tensors:
    pages = torch.stack([torch.randperm(4)[:3] for _ in range(2 * size.batch)]).int().view(size.batch, 2, 3)
    counts = torch.tensor([[3, 2], [1, 3]], dtype=torch.int32)[: size.batch]
    return {**size.call(35, 2), "pages": pages, "counts": counts}


def run_page_decode(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    call = replace(as_call(x), phase="decode")
    out, lse, _ = page_decode.attend(call, PagePlan.of(call, x["pages"], x["counts"], 8), backend, return_lse=True)
    assert lse is not None
    return out, lse


def run_every_page(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    call = replace(as_call(x), phase="decode", kv_end=torch.tensor(30, device=x["q"].device))
    out, lse, logits = page_decode.attend(call, PagePlan.every(call, wants_logits=True), backend)
    assert lse is not None and logits is not None
    return out, lse, logits[:, :, :27]  # what all rows have


def run_span(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    call = as_call(x)
    return span.attend(call, SpanPlan.of(call, [2, 0], [9, None]), backend, return_lse=True)[:2]


RING = span_ring.RingLayout.of([2, 1], [6, 4], 100)


def make_ring(size: Size, tokens: int) -> Tensors:
    x = without(size.call(tokens, tokens), "kv_start")
    rings = (size.rand(size.batch, RING.total, dim) for dim in size.dims)
    return {**x, **dict(zip(("ring_k", "ring_v"), rings, strict=True)), "before": torch.tensor([9, 3])[: size.batch]}


def run_ring(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    return span_ring.attend(as_call(x), span_ring.Ring(RING, x["ring_k"], x["ring_v"]), x["before"], backend)[:2]


def run_ring_write(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    span_ring.write(span_ring.Ring(RING, x["ring_k"], x["ring_v"]), x["k"], x["v"], x["before"], backend)
    return x["ring_k"], x["ring_v"]


def run_dense(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (dense.attend(as_call(x), backend).out,)


def run_triangle(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    call = as_call(x)
    if backend == "reference":
        return (block_sparse.attend(call, BlockPlan.every(call, 16), "reference")[0],)
    return run_dense(x, backend)


LISTS = ("indices", "counts", "columns", "column_counts")
ATTENTION = {
    "block_sparse": Op(make_block_sparse, run_block_sparse, right="reference", together=LISTS),
    "token_blocks": Op(make_token_blocks, run_token_blocks, right="reference", together=("entries", "counts")),
    "page_decode": Op(make_page_decode, run_page_decode, right="reference", together=("pages", "counts")),
    "every page": Op(lambda size: size.call(35, 2), run_every_page, right="reference"),
    "span": Op(lambda size: size.call(30, 12), run_span, right="reference"),
    "ring, one token": Op(lambda size: without(make_ring(size, 1), "k", "v"), run_ring, right="reference"),
    "ring, more tokens": Op(lambda size: make_ring(size, 3), run_ring, right="reference"),
    "ring write": Op(
        lambda size: without(make_ring(size, 3), "q"), run_ring_write, right="reference", written=("ring_k", "ring_v")
    ),
    "dense": Op(lambda size: without(size.call(20, 20), "kv_start"), run_triangle, ("sdpa",), "reference"),
}
