"""Every op, every tensor that it is given, in every layout: the numbers decide, not where they lie.

An op in a table below runs on tensors laid out in some way, with NaN (or 0) where no number of theirs lies, and must
give what it gives for contiguous copies in the plainest backend that it has.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_patch.calibration.moa.influence import BLOCK, influence_in_torch
from sparse_patch.calibration.moa.influence_triton import partial_influence
from sparse_patch.call import AttentionCall
from sparse_patch.ops import block_sparse, dense, page_decode, span, span_ring, token_blocks
from sparse_patch.ops.antidiagonal import block_masses
from sparse_patch.ops.block_means import torch as means_in_torch
from sparse_patch.ops.block_means import triton as means_in_triton
from sparse_patch.ops.block_sparse.triton import block_sparse_attention
from sparse_patch.ops.compact import torch as compact_in_torch
from sparse_patch.ops.compact import triton as compact_in_triton
from sparse_patch.ops.compressed_keys import BlockRule
from sparse_patch.ops.compressed_keys import torch as blocks_in_torch
from sparse_patch.ops.compressed_keys import triton as blocks_in_triton
from sparse_patch.ops.kernels import copyable
from sparse_patch.ops.lines import LineRule, QueryAware
from sparse_patch.ops.lines import torch as lines_in_torch
from sparse_patch.ops.lines import triton as lines_in_triton
from sparse_patch.ops.page_scores import torch as page_scores_in_torch
from sparse_patch.ops.page_scores import triton as page_scores_in_triton
from sparse_patch.ops.page_statistics import torch as statistics_in_torch
from sparse_patch.ops.page_statistics import triton as statistics_in_triton
from sparse_patch.ops.profiles import torch as profiles_in_torch
from sparse_patch.ops.profiles import triton as profiles_in_triton
from sparse_patch.ops.scores import ScoreRule
from sparse_patch.ops.scores import decisions as decide
from sparse_patch.ops.scores.triton import decide_blocks, quantise_keys
from sparse_patch.ops.span.triton import span_attention
from sparse_patch.ops.token_blocks.triton import token_block_attention
from sparse_patch.ops.top_pages import torch as pages_in_torch
from sparse_patch.ops.top_pages import triton as pages_in_triton
from sparse_patch.plans import BlockGrid, BlockPlan, PagePlan, SpanPlan, TokenBlockPlan, leading

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """What tensors are made in.

    Attributes:
        batch: rows; of two, the second has 3 tokens of padding.
        dims: head dim of queries and keys, and of values.
        dtype: of queries, keys and values.
        device: where the op runs; what is right is computed on the CPU.
    """

    batch: int = 2
    dims: tuple[int, int] = (16, 8)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.dtype)

    def call(self, length: int, queries: int, heads: tuple[int, int] = (2, 2)) -> Tensors:
        """The tensors of a call."""
        head_dim, value_dim = self.dims
        return {
            "q": self.rand(self.batch, heads[0], queries, head_dim),
            "k": self.rand(self.batch, heads[1], length, head_dim),
            "v": self.rand(self.batch, heads[1], length, value_dim),
            "kv_start": torch.tensor([0, 3])[-self.batch :],
        }


@dataclass(frozen=True)
class Op:
    """An op in the table.

    Attributes:
        make: its tensors.
        run: its results with a backend.
        backends: those that are tried, and the one whose results are right.
        together: names of tensors of which none makes sense without the others.
        written: names of those that it writes, which cannot be expanded.
        tolerance: of results with float32 tensors; with float16 a hundred times as much.
        slow: whether it takes Triton's interpreter a second, so that fewer layouts are tried.
    """

    make: Callable[[Size], Tensors]
    run: Callable[[Tensors, str], tuple[Tensor, ...]]
    backends: tuple[str, ...] = ("triton", "torch")
    right: str = "torch"
    together: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    tolerance: float = 2e-5
    slow: bool = False


def as_call(x: Tensors) -> AttentionCall:
    missing = x["q"]  # of ops that read no values, or no keys
    k = x.get("k", missing)
    q_start = k.shape[2] - x["q"].shape[2]
    return AttentionCall(x["q"], k, x.get("v", k), x["q"].shape[-1] ** -0.5, 0, "prefill", q_start, x.get("kv_start"))


def without(x: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in x.items() if name not in names}


def either(backend: str, triton: Any, torch: Any) -> Any:
    return triton if backend == "triton" else torch


# Attention.


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
    out, lse = block_sparse.attend(as_call(x), block_plan_of(x), backend, return_lse=True)
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
    out, lse = token_blocks.attend(call, plan, backend, return_lse=True)
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
    return span.attend(call, SpanPlan.of(call, [2, 0], [9, None]), backend)


RING = span_ring.RingLayout.of([2, 1], [6, 4], 100)


def make_ring(size: Size, tokens: int) -> Tensors:
    x = without(size.call(tokens, tokens), "kv_start")
    rings = (size.rand(size.batch, RING.total, dim) for dim in size.dims)
    return {**x, **dict(zip(("ring_k", "ring_v"), rings, strict=True)), "before": torch.tensor([9, 3])[: size.batch]}


def run_ring(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    return span_ring.attend(as_call(x), span_ring.Ring(RING, x["ring_k"], x["ring_v"]), x["before"], backend)


def run_ring_write(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    span_ring.write(span_ring.Ring(RING, x["ring_k"], x["ring_v"]), x["k"], x["v"], x["before"], backend)
    return x["ring_k"], x["ring_v"]


def run_dense(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    return (dense.attend(as_call(x), backend),)


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


# Selection.


def run_profiles(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, profiles_in_triton, profiles_in_torch)
    by_key, by_distance = of_backend.last_query_profiles(as_call(x), 16)
    return by_key, by_distance


def make_lines(size: Size) -> Tensors:
    return {**without(size.call(40, 20), "v"), "mean_k": torch.randn(size.batch, 2, 3, size.dims[0])}


def run_lines(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    call, of_backend = as_call(x), either(backend, lines_in_triton, lines_in_torch)
    rule = LineRule(gamma=0.6, tau=0.5, min_blocks=1, max_blocks=None, reach=True)
    verticals, slashes, aware = of_backend.choose_lines(call, BlockGrid.of(call, 16), x["mean_k"], rule)
    return verticals, slashes, aware


def make_plan_of_lines(size: Size) -> Tensors:
    lines = {name: torch.rand(size.batch, 2, 3) < 0.3 for name in ("verticals", "slashes")}
    return {**make_lines(size), **lines, "heads": torch.tensor([[True, False], [False, True]])[: size.batch]}


def run_plan_of_lines(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    call, of_backend = as_call(x), either(backend, lines_in_triton, lines_in_torch)
    aware = QueryAware(x["heads"], call, x["mean_k"], 0.7, False, None)
    return (of_backend.plan_of_lines(x["verticals"], x["slashes"], aware, BlockGrid.of(call, 16)).blocks(),)


def make_mass(size: Size) -> Tensors:
    return {"mass": torch.randn(size.batch, 2, 20).mul(3).softmax(-1)}


def run_tokens_within(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, lines_in_triton, lines_in_torch)
    return (of_backend.tokens_within(x["mass"], 0.8),)


def run_means(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend, grid = either(backend, means_in_triton, means_in_torch), BlockGrid.of(as_call(x), 16)
    return (
        of_backend.key_means(x["k"], grid),
        of_backend.query_means(x["q"], grid),
        *of_backend.query_means_and_similarities(x["q"], grid),
        of_backend.key_similarities(x["k"], grid, x["center"]),
    )


def run_antidiagonal(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    call = as_call(x)
    return tuple(masses for _, masses in block_masses(call, BlockGrid.of(call, 16), 4, backend))


def make_compressed(size: Size) -> Tensors:
    keys = {name: size.rand(size.batch, 1, number, size.dims[0]) for name, number in (("k1", 16), ("k2", 4))}
    return {**without(size.call(270, 4, heads=(2, 1)), "v"), **keys}


def run_compressed(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    call, of_backend = as_call(x), either(backend, blocks_in_triton, blocks_in_torch)
    rule = BlockRule(init_blocks=0, local_blocks=1, dense_blocks=0, chosen=2)
    entries, counts = of_backend.choose(call, x["k1"], x["k2"], rule, BlockGrid.of(call, 64), 8)
    return entries * leading(entries, counts), counts


def make_of_pages(size: Size) -> Tensors:
    return {"of_pages": torch.randn(size.batch, 4, 20), "lengths": torch.tensor([300, 290])[: size.batch]}


def run_block_scores(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, blocks_in_triton, blocks_in_torch)
    scores = of_backend.block_scores(x["of_pages"], x["lengths"], 2, 0.3, None, BlockRule(1, 1, 0, 2))
    return (scores,)


def make_page_scores(size: Size) -> Tensors:
    logits, lengths = torch.randn(size.batch, 2, 37), torch.tensor([37, 20])[: size.batch]
    return {"logits": logits, "lse": logits.logsumexp(-1), "lengths": lengths}


def run_page_scores(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, page_scores_in_triton, page_scores_in_torch)
    return (of_backend.page_scores(x["logits"], x["lse"], x["lengths"], 8),)


def make_statistics(size: Size) -> Tensors:
    stored = {name: size.rand(size.batch, 2, 5, size.dims[0]) for name in ("low", "high")}
    return {**without(size.call(37, 20), "v"), **stored}


def run_bounds(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, statistics_in_triton, statistics_in_torch)
    of_backend.refresh(as_call(x), [x["low"], x["high"]], 9, 8, 0)
    return x["low"], x["high"]


def run_page_means(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, statistics_in_triton, statistics_in_torch)
    of_backend.refresh(as_call(x), [x["low"]], 9, 8, 4)
    return (x["low"],)


def make_statistics_scores(size: Size) -> Tensors:
    x, lengths = make_statistics(size), torch.tensor([37, 20])[: size.batch]
    return {**without(x, "k", "kv_start"), "q": x["q"][:, :, 0], "lengths": lengths}


def run_statistics_scores(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, statistics_in_triton, statistics_in_torch)
    return (
        of_backend.bound_scores(x["q"], x["low"], x["high"], x["lengths"], 8),
        of_backend.mean_scores(x["q"], x["low"], x["lengths"], 8),
    )


def make_decisions(size: Size) -> Tensors:
    tau = torch.tensor([0.004, 0.01])
    return {**without(size.call(230, 20, heads=(2, 1)), "v"), "tau": tau}


def run_decisions(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    return tuple(decide(as_call(x), x["tau"], ScoreRule(numerics, 32), backend) for numerics in ("int8", "int4"))


def make_kernels_of_scores(size: Size) -> Tensors:
    means = (size.rand(size.batch, heads, size.dims[0]) * 0.1 for heads in (1, 2))
    return {**make_decisions(size), **dict(zip(("mean_k", "mean_q"), means, strict=True))}


def run_kernels_of_scores(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    call, of_rows, means = as_call(x), x["kv_start"], (x["mean_k"], x["mean_q"])
    of_keys = quantise_keys(x["k"], *means, of_rows, 7)
    settings = of_rows, call.scale, 0.0, call.q_start, 32, BlockGrid.of(call, 64).num_query_blocks, 1
    return *of_keys, decide_blocks(x["q"], x["k"], *of_keys, *means, x["tau"], *settings)


def run_top_pages(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, pages_in_triton, pages_in_torch)
    pages, counts = of_backend.top_pages(x["scores"], x["limits"], 5)
    return pages * leading(pages, counts), counts


def make_marks(size: Size) -> Tensors:
    shape = size.batch, 2, 3, 20
    return {"marked": torch.rand(shape) < 0.4, "values": torch.randint(1, 1000, shape, dtype=torch.int32)}


def run_compact(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, compact_in_triton, compact_in_torch)
    lists, counts = of_backend.compact(x["marked"], x["values"])
    return lists * leading(lists, counts), counts


def make_influence(size: Size) -> Tensors:
    x = without(replace(size, batch=1).call(70, 70), "kv_start")
    x = {name: tensor[0] for name, tensor in x.items()}
    return {**x, "out": size.rand(2, 70, size.dims[1]), "grad": size.rand(2, 70, size.dims[1])}


def run_influence(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    arguments = x["q"], x["k"], x["v"], x["out"], x["grad"], x["q"].shape[-1] ** -0.5
    if backend == "torch":
        found = influence_in_torch(*arguments)
        return found.sink, found.moa, found.set
    return tuple(sums.unflatten(0, (2, -1)).sum(1) for sums in partial_influence(*arguments, BLOCK, 1e-6))


STORED = ("low", "high")
SELECTION = {
    "profiles": Op(lambda size: without(size.call(40, 20), "v"), run_profiles),
    "lines": Op(make_lines, run_lines, slow=True),
    "plan of lines": Op(make_plan_of_lines, run_plan_of_lines, slow=True),
    "tokens within": Op(make_mass, run_tokens_within, slow=True),
    "means": Op(
        lambda size: {**without(size.call(40, 20), "v"), "center": torch.randn(size.batch, 2, size.dims[0])}, run_means
    ),
    "antidiagonal": Op(lambda size: without(size.call(40, 20), "v"), run_antidiagonal),
    "compressed keys": Op(make_compressed, run_compressed, slow=True),
    "block scores": Op(make_of_pages, run_block_scores),
    "page scores": Op(make_page_scores, run_page_scores),
    "page bounds": Op(make_statistics, run_bounds, written=STORED),
    "page means": Op(lambda size: without(make_statistics(size), "high"), run_page_means, written=STORED),
    "statistics' scores": Op(make_statistics_scores, run_statistics_scores),
    "decisions": Op(make_decisions, run_decisions, ("torch",)),
    "decisions' kernels": Op(make_kernels_of_scores, run_kernels_of_scores, ("triton",), "triton", slow=True),
    "top pages": Op(
        lambda size: {
            "scores": torch.randn(size.batch, 2, 20),
            "limits": torch.tensor([[20, 9], [3, 15]])[: size.batch],
        },
        run_top_pages,
    ),
    "compact": Op(make_marks, run_compact),
    "influence": Op(make_influence, run_influence, tolerance=2e-4),
}
OPS = {**ATTENTION, **SELECTION}


# Layouts: each gives a tensor somewhere else in memory.


def gaps(x: Tensor, *shape: int) -> Tensor:
    """Room in which what is no number of the tensor shows."""
    return x.new_full(shape, torch.nan if x.is_floating_point() else 0)


def spread(x: Tensor) -> Tensor:
    """The last stride is 2."""
    room = gaps(x, *x.shape[:-1], 2 * x.shape[-1])
    room[..., ::2] = x
    return room[..., ::2]


def last_first(x: Tensor) -> Tensor:
    """The last dimension is the outermost one in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def expanded(x: Tensor) -> Tensor:
    """All heads, or all rows if there is one head, are one in memory."""
    dim = 1 if x.ndim > 1 and x.shape[1] > 1 else 0
    return x.narrow(dim, 0, 1).expand_as(x)


def odd(x: Tensor) -> Tensor:
    """No stride but the last is a multiple of anything, and between rows lie gaps."""
    room = gaps(x, *(size + 1 + size % 2 for size in x.shape))
    view = room[tuple(slice(size) for size in x.shape)]
    return view.copy_(x)


def shifted(x: Tensor) -> Tensor:
    """Contiguous, from an address that is no multiple of 16 bytes."""
    return gaps(x, x.numel() + 1)[1:].view(x.shape).copy_(x)


def reversed_dims(x: Tensor) -> Tensor:
    """All dimensions but the last lie in memory the other way round: tokens, heads, rows."""
    order = [*range(x.ndim - 2, -1, -1), x.ndim - 1] if x.ndim > 1 else [0]
    return x.permute(order).contiguous().permute(order)


def single(x: Tensor) -> Tensor:
    """What PyTorch calls contiguous: the strides of dimensions of size 1 are odd numbers."""
    strides = [2 * x.numel() + 7 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, strides)


def plain(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


Layout = Callable[[Tensor], Tensor]


def made(name: str, size: Size, layouts: dict[str, Layout]) -> Tensors:
    """The tensors of an op, always the same numbers; those that no layout is named for are contiguous."""
    torch.manual_seed(0)
    return {key: layouts.get(key, plain)(plain(x).to(size.device)) for key, x in OPS[name].make(size).items()}


@cache
def right(name: str, size: Size, alike: tuple[str, ...]) -> tuple[Tensor, ...]:
    """What is right for contiguous tensors; the heads of some are `alike`."""
    given = made(name, size, dict.fromkeys(alike, expanded))
    results = OPS[name].run({key: plain(x) for key, x in given.items()}, OPS[name].right)
    assert any(x.any() for x in results), "nothing to see"
    return results


def agree(name: str, backend: str, size: Size, layouts: dict[str, Layout]) -> None:
    """What an op makes of tensors is what its plainest backend makes of contiguous copies."""
    alike = tuple(key for key, layout in layouts.items() if layout is expanded)
    results = OPS[name].run(made(name, size, layouts), backend)
    plainest = replace(size, device="cpu") if OPS[name].right == "torch" else size
    tolerance = OPS[name].tolerance * (1 if size.dtype == torch.float32 else 100)
    for ours, theirs in zip(results, right(name, plainest, alike), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), atol=tolerance, rtol=tolerance)


def alone(op: Op) -> list[tuple[str, ...]]:
    """The tensors of an op, each alone but those that make sense only together."""
    each = [(name,) for name in op.make(Size()) if name not in op.together]
    return [*each, op.together] if op.together else each


ONE_AT_A_TIME = [
    pytest.param(name, backend, tensors, layout, id=f"{name}-{backend}-{'+'.join(tensors)}-{layout.__name__}")
    for name, op in OPS.items()
    for backend in op.backends
    for tensors in alone(op)
    for layout in ((spread,) if op.slow else (spread, expanded))
    if layout is spread or not set(tensors) & set(op.written)
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name, backend, tensors, layout", ONE_AT_A_TIME)
def test_one_tensor_anywhere(name: str, backend: str, tensors: tuple[str, ...], layout: Layout) -> None:
    agree(name, backend, Size(), dict.fromkeys(tensors, layout))


ALL_AT_ONCE = [
    pytest.param(name, backend, layout, id=f"{name}-{backend}-{layout.__name__}")
    for name, op in OPS.items()
    for backend in op.backends
    for layout in ((odd, single) if op.slow else (odd, single, shifted, last_first, reversed_dims))
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name, backend, layout", ALL_AT_ONCE)
def test_all_tensors_anywhere(name: str, backend: str, layout: Layout) -> None:
    size = Size(batch=1 if layout is single else 2)
    agree(name, backend, size, dict.fromkeys(OPS[name].make(size), layout))


# Head dims of queries and keys, and of values, that fill no tile, no 16 bytes, or all that the kernels serve.
DIMS = [(20, 36), (50, 100), (66, 72), (100, 50), (160, 192), (256, 20)]
HAVE_DIMS = [name for name, op in OPS.items() if "q" in op.make(Size()) and not op.slow]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", [name for name in HAVE_DIMS if name in ATTENTION])
def test_any_head_dim(name: str, dims: tuple[int, int]) -> None:
    agree(name, OPS[name].backends[0], Size(dims=dims, dtype=torch.float16), {})


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("head_dim", [20, 66, 100, 160])
@pytest.mark.parametrize("name", [name for name in HAVE_DIMS if name in SELECTION])
def test_any_head_dim_of_a_selection(name: str, head_dim: int) -> None:
    agree(name, OPS[name].backends[0], Size(dims=(head_dim, 36)), {})


def test_a_descriptor_gets_what_it_can_describe() -> None:
    """Rows of whole steps of 16 bytes are taken as they are; all others are copied into rows that are."""
    fits = torch.randn(2, 3, 5, 24, dtype=torch.float16)
    for x in (fits, fits[:, :2, 1:4], fits.transpose(1, 2), fits[..., 8:20], expanded(fits)):
        assert copyable(x) is x
    for x in (fits[..., :20].contiguous(), spread(fits), last_first(fits), odd(fits), shifted(fits), single(fits[:1])):
        copied = copyable(x)
        assert torch.equal(copied, x) and copied.data_ptr() != x.data_ptr()
        assert copied.data_ptr() % 16 == 0 and copied.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in copied.stride()[:-1])


@pytest.mark.parametrize("layout", [plain, odd])
def test_fakes_know_the_results_of_any_layout(layout: Layout) -> None:
    """What torch.compile plans with has the shapes, dtypes and strides of what it gets."""
    size = Size(dims=(20, 12), dtype=torch.float16)
    x = made("block_sparse", size, dict.fromkeys(("q", "k", "v"), layout))
    lists = x["indices"], x["counts"], x["columns"], x["column_counts"], x["kv_start"]
    check(block_sparse_attention, x["q"], x["k"], x["v"], *lists, 0.3, 0.0, 16, 18, None, True)
    check(span_attention, x["q"], x["k"], x["v"], x["kv_start"], None, [2, 0], [9, 0, 0, 9] * 2, 0.3, 0.0, False)
    x = made("token_blocks", size, dict.fromkeys(("q", "k", "v"), layout))
    lists = x["entries"], x["counts"], x["kv_start"]
    check(token_block_attention, x["q"], x["k"], x["v"], *lists, 0.3, 0.0, 64, TILE, 1, 0, 0, 144, True)


def check(launch: Any, *arguments: object) -> None:
    torch.library.opcheck(launch.op, arguments, test_utils="test_faketensor")
