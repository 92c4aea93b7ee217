"""The ops that select, and two that prepare a calibration or a list, with tensors for each."""

from dataclasses import replace

import torch
from torch import Tensor

from builders.op import Op, Size, Tensors, as_call, either, without
from sparse_patch.calibration.moa.influence import BLOCK, influence_in_torch
from sparse_patch.calibration.moa.influence_triton import partial_influence
from sparse_patch.kernels.compaction import torch as compact_in_torch
from sparse_patch.kernels.compaction import triton as compact_in_triton
from sparse_patch.kernels.page_pairs.triton import add_page_pairs
from sparse_patch.ops.selection.antidiagonal import block_masses
from sparse_patch.ops.selection.block_means import torch as means_in_torch
from sparse_patch.ops.selection.block_means import triton as means_in_triton
from sparse_patch.ops.selection.compressed_keys import CompressedKeysParams
from sparse_patch.ops.selection.compressed_keys import torch as blocks_in_torch
from sparse_patch.ops.selection.compressed_keys import triton as blocks_in_triton
from sparse_patch.ops.selection.framed_lists import Frame
from sparse_patch.ops.selection.framed_lists import torch as frames_in_torch
from sparse_patch.ops.selection.framed_lists import triton as frames_in_triton
from sparse_patch.ops.selection.last_queries import torch as profiles_in_torch
from sparse_patch.ops.selection.last_queries import triton as profiles_in_triton
from sparse_patch.ops.selection.low_bit_scores import LowBitParams
from sparse_patch.ops.selection.low_bit_scores import decisions as decide
from sparse_patch.ops.selection.low_bit_scores.triton import decide_blocks, quantise_keys
from sparse_patch.ops.selection.page_scores import torch as page_scores_in_torch
from sparse_patch.ops.selection.page_scores import triton as page_scores_in_triton
from sparse_patch.ops.selection.page_statistics import torch as statistics_in_torch
from sparse_patch.ops.selection.page_statistics import triton as statistics_in_triton
from sparse_patch.ops.selection.rank_merge import torch as merge_in_torch
from sparse_patch.ops.selection.rank_merge import triton as merge_in_triton
from sparse_patch.ops.selection.top_pages import torch as pages_in_torch
from sparse_patch.ops.selection.top_pages import triton as pages_in_triton
from sparse_patch.ops.selection.vertical_slash import QueryAware, VerticalSlashParams
from sparse_patch.ops.selection.vertical_slash import torch as lines_in_torch
from sparse_patch.ops.selection.vertical_slash import triton as lines_in_triton
from sparse_patch.plans import BlockGrid, PagePlan, leading


def run_profiles(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, profiles_in_triton, profiles_in_torch)
    by_key, by_distance = of_backend.last_query_profiles(as_call(x), 16)
    return by_key, by_distance


def make_lines(size: Size) -> Tensors:
    return {**without(size.call(40, 20), "v"), "mean_k": torch.randn(size.batch, 2, 3, size.dims[0])}


def run_lines(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    call, of_backend = as_call(x), either(backend, lines_in_triton, lines_in_torch)
    rule = VerticalSlashParams(gamma=0.6, tau=0.5, min_blocks=1, max_blocks=None, reach=True)
    verticals, slashes, aware = of_backend.choose_vertical_slash(call, BlockGrid.of(call, 16), x["mean_k"], rule)
    return verticals, slashes, aware


def make_plan_of_lines(size: Size) -> Tensors:
    lines = {name: torch.rand(size.batch, 2, 3) < 0.3 for name in ("verticals", "slashes")}
    return {**make_lines(size), **lines, "heads": torch.tensor([[True, False], [False, True]])[: size.batch]}


def run_plan_of_lines(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    call, of_backend = as_call(x), either(backend, lines_in_triton, lines_in_torch)
    aware = QueryAware(x["heads"], call, x["mean_k"], 0.7, False, None)
    return (of_backend.plan_of_vertical_slash(x["verticals"], x["slashes"], aware, BlockGrid.of(call, 16)).blocks(),)


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
    rule = CompressedKeysParams(init_blocks=0, local_blocks=1, dense_blocks=0, chosen=2)
    entries, counts = of_backend.choose(call, x["k1"], x["k2"], rule, BlockGrid.of(call, 64), 8)
    return entries * leading(entries, counts), counts


def make_of_pages(size: Size) -> Tensors:
    return {"of_pages": torch.randn(size.batch, 4, 20), "lengths": torch.tensor([300, 290])[: size.batch]}


def run_block_scores(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, blocks_in_triton, blocks_in_torch)
    scores = of_backend.block_scores(x["of_pages"], x["lengths"], 2, 0.3, None, CompressedKeysParams(1, 1, 0, 2))
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
        of_backend.bound_scores(x["q"], x["low"], x["high"], x["lengths"], 8, "max"),
    )


def make_decisions(size: Size) -> Tensors:
    tau = torch.tensor([0.004, 0.01])
    return {**without(size.call(230, 20, heads=(2, 1)), "v"), "tau": tau}


def run_decisions(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    return tuple(decide(as_call(x), x["tau"], LowBitParams(numerics, 32), backend) for numerics in ("int8", "int4"))


def make_kernels_of_scores(size: Size) -> Tensors:
    means = (size.rand(size.batch, heads, size.dims[0]) * 0.1 for heads in (1, 2))
    return {**make_decisions(size), **dict(zip(("mean_k", "mean_q"), means, strict=True))}


def run_kernels_of_scores(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    call, of_rows, means = as_call(x), x["kv_start"], (x["mean_k"], x["mean_q"])
    of_keys = quantise_keys(x["k"], *means, of_rows, 7)
    settings = of_rows, call.scale, 0.0, call.q_start, 32, BlockGrid.of(call, 64).num_query_blocks, 1
    return *of_keys, decide_blocks(x["q"], x["k"], *of_keys, *means, x["tau"], *settings)


def make_ranked(size: Size) -> Tensors:
    return {"scores": torch.randn(size.batch, 2, 20), "limits": torch.tensor([[20, 9], [3, 15]])[: size.batch]}


def run_top_pages(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, pages_in_triton, pages_in_torch)
    pages, counts = of_backend.top_pages(x["scores"], x["limits"], 5)
    return pages * leading(pages, counts), counts


def make_listed(size: Size) -> Tensors:
    blocks = torch.tensor([[[0, 2, 5], [1, 3, 4]], [[0, 1, 3], [1, 2, 3]]], dtype=torch.int32)
    counts = torch.tensor([[3, 2], [1, 3]], dtype=torch.int32)
    x = {"blocks": blocks, "counts": counts, "lengths": torch.tensor([90, 70])}
    return {name: tensor[: size.batch] for name, tensor in x.items()}


def run_frames(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, frames_in_triton, frames_in_torch)
    pages, counts = of_backend.framed_pages(x["blocks"], x["counts"], x["lengths"], 100, Frame(4, 8, 20))
    return pages * leading(pages, counts), counts


def run_pairs(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    plan = PagePlan(8, 4, 3, 100, x["lengths"], None, x["blocks"], x["counts"])
    if backend == "torch":
        return (plan.computed_pairs().sum(0),)
    total = torch.zeros(4, dtype=torch.int64, device=plan.lengths.device)
    add_page_pairs(total, plan.lengths, plan.pages, plan.counts, plan.page_size, plan.q_length)
    return (total,)


def run_merge(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, merge_in_triton, merge_in_torch)
    return (of_backend.merge(x["scores"], x["limits"][:, 0], 5, 1, 2, 4),)


def run_merged_list(x: Tensors, backend: str) -> tuple[Tensor, ...]:
    of_backend = either(backend, merge_in_triton, merge_in_torch)
    pages, counts = of_backend.merged_list(x["scores"], x["limits"][:, 0], 7, 1, 2)
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
    "top pages": Op(make_ranked, run_top_pages),
    "rank merge": Op(make_ranked, run_merge),
    "merged list": Op(make_ranked, run_merged_list),
    "framed lists": Op(make_listed, run_frames),
    "page pairs": Op(make_listed, run_pairs),
    "compact": Op(make_marks, run_compact),
    "influence": Op(make_influence, run_influence, tolerance=2e-4),
}
