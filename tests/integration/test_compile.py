"""`torch.compile` of whole patched models, as one graph. test_gpu_compile.py tests what is sparse on a GPU."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.reports import counted_in_graphs
from families import RECENT, llama
from method_table import TWO_LAYERS, configurations, write_plans
from torch import nn
from transformers import PreTrainedModel, StaticCache

from sparse_patch import capture_plans, patched, reset_report, sparsity_report
from sparse_patch.integration.patch import states_on
from sparse_patch.integration.reporting import uncounted
from sparse_patch.plans import SparsePlan
from sparse_patch.report import CompiledCounts, PhaseCompiledCounts, PhaseCounts, PhaseReport, SparsityReport, Work

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_graphs")
WITHOUT_KERNELS = "prefill inside torch.compile without Triton's kernels"
PADDING = "padding mask inside torch.compile (pass none with prompts of one length)"
PACKED = "mask inside torch.compile that may be of packed sequences (use_cache=True rules them out)"
SPANS = ("streamingllm", "moa", "duoattention")


@pytest.fixture(scope="module")
def two_layers() -> PreTrainedModel:
    return llama(layers=2)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    write_plans(folder, TWO_LAYERS)
    return folder


def compiled(model: nn.Module | Callable[..., Any], **options: Any) -> Any:
    return torch.compile(model, fullgraph=True, backend="eager", **options)


def ids(length: int = 290, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(length))


def padding() -> torch.Tensor:
    mask = torch.ones(2, 290, dtype=torch.long)
    mask[1, :20] = 0
    return mask


def ways(model: PreTrainedModel) -> dict[str, tuple[dict[str, Any], str]]:
    """What a prompt may come with, and why it is dense inside a graph, if not for lack of kernels."""
    cache = StaticCache(config=model.config, max_cache_len=300)
    return {
        "plain": ({}, ""),
        "padded": ({"attention_mask": padding()}, PADDING),
        "static": ({"past_key_values": cache}, ""),
        "without a cache": ({"use_cache": False}, PACKED),
    }


def fallbacks(report: SparsityReport) -> list[dict[str, int]]:
    assert all(layer.compiled for layer in report.layers)
    return [layer.prefill.fallbacks for layer in report.layers]


CASES = [
    *((name, "plain") for name in ("a_shape", "xattention", "infllmv2", "moa")),
    *((name, way) for name in ("flexprefill-coverage", "streamingllm") for way in ("padded", "static")),
    ("quest-kv_group-max-added", "static"),
    ("spargeattn-topk", "without a cache"),
]


@pytest.mark.parametrize("name, way", CASES)
@torch.no_grad()
def test_a_prompt_in_one_graph(name: str, way: str, plans: Path, two_layers: PreTrainedModel) -> None:
    """Spans are read sparsely. Other methods are dense as in the unpatched model; each layer counts the reason."""
    inputs, reason = ways(two_layers)[way]
    expected = two_layers(ids(), **inputs).logits
    config = configurations(plans, layers=2)[name]
    with patched(two_layers, config):
        sparse = two_layers(ids(), **ways(two_layers)[way][0]).logits
        uncompiled = sparsity_report(two_layers)
        reset_report(two_layers)
        found = compiled(two_layers)(ids(), **ways(two_layers)[way][0]).logits
        report = sparsity_report(two_layers)
    runs_sparsely = name in SPANS and not reason
    torch.testing.assert_close(found, sparse if runs_sparsely else expected, atol=1e-4, rtol=1e-4)
    if runs_sparsely or "decode" in config:
        assert counted_in_graphs(report) == uncompiled.layers
    for layer, before in zip(report.layers, uncompiled.layers, strict=True):
        assert layer.prefill.calls == 1 and layer.prefill.pairs[1:] == before.prefill.pairs[1:]
        assert layer.prefill.density == (before.prefill.density if runs_sparsely else 1.0)
    if "decode" in config:  # prompts are dense by design
        assert fallbacks(report) == [{}] * 2 and torch.allclose(sparse, expected, atol=1e-4)
        return
    assert fallbacks(report) == [{} if runs_sparsely else {reason or WITHOUT_KERNELS: 1}] * 2
    assert not torch.allclose(sparse, expected, atol=1e-3), "something was left out"


@pytest.mark.parametrize("name, found", [("a_shape", {WITHOUT_KERNELS: 3}), ("moa", {})])
@torch.no_grad()
def test_every_run_of_a_graph_is_counted(
    name: str, found: dict[str, int], plans: Path, two_layers: PreTrainedModel
) -> None:
    """Also after a reset, without compiling anything again; what a copy computes is its own."""
    with patched(two_layers, configurations(plans, layers=2)[name]):
        graph = compiled(two_layers)
        for _ in range(3):
            graph(ids())
        copied, report = copy.deepcopy(two_layers), sparsity_report(two_layers)
        assert fallbacks(report) == [found] * 2 and [layer.prefill.calls for layer in report.layers] == [3, 3]
        assert sparsity_report(copied) == sparsity_report(two_layers) == report
        reset_report(two_layers)
        assert sparsity_report(two_layers).pairs("prefill") == (0, 0, 0)
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(3):
                graph(ids())
        assert sparsity_report(two_layers) == report
        compiled(copied)(ids())
        assert [layer.prefill.calls for layer in sparsity_report(copied).layers] == [4, 4]
        assert sparsity_report(two_layers) == report
        with uncounted(two_layers):
            graph(ids())
        assert sparsity_report(two_layers) == report


@pytest.mark.parametrize("in_graphs", [None, CompiledCounts.zeros(3, torch.device("cpu"))], ids=["none", "others"])
@torch.no_grad()
def test_calls_that_a_graph_cannot_count(
    in_graphs: CompiledCounts | None, plans: Path, two_layers: PreTrainedModel
) -> None:
    """As of a model that moved after it was patched. An uncompiled call on the new device makes graphs count again."""
    with patched(two_layers, configurations(plans, layers=2)["a_shape"]):
        for state in states_on(two_layers):
            state.in_graphs = in_graphs
        compiled(two_layers)(ids())
        report = sparsity_report(two_layers)
        assert fallbacks(report) == [{WITHOUT_KERNELS: 1}] * 2 and report.layers[0].prefill.calls == 0
        assert "2 layers also ran inside compiled graphs, whose calls are not counted" in str(report)
        two_layers(ids())
        reset_report(two_layers)
        compiled(two_layers)(ids())
        assert counted_in_graphs(sparsity_report(two_layers))[0].prefill.calls == 1


@pytest.mark.parametrize("name", ["minference", "sale-int8", "infllmv2", "duoattention"])
@torch.no_grad()
def test_a_graph_counts_every_kind_of_plan(name: str, plans: Path, two_layers: PreTrainedModel) -> None:
    """On a GPU graphs run all of them."""
    with patched(two_layers, configurations(plans, layers=2)[name]), capture_plans(two_layers) as captured:
        two_layers(ids(), attention_mask=padding())
    (_, plan), *_ = captured[1]
    assert isinstance(plan, SparsePlan)
    pairs, decided = plan.computed_pairs().sum(0), plan.decided_pairs
    in_graph, counts = PhaseCompiledCounts.zeros(len(pairs), pairs.device), PhaseCounts()

    def count(plan: SparsePlan) -> None:
        in_graph.add_sparse(Work(3, 40, 30), plan, copying=False, keeping=False)

    for _ in range(2):
        compiled(count, dynamic=True)(plan)
    in_graph.move_to(counts)
    report = PhaseReport.of(counts)
    assert (report.calls, report.sparse_calls, report.pairs[1:]) == (2, 2, (80, 6))
    assert report.density_by_head == pytest.approx((2 * pairs / 80).tolist())
    assert report.surplus == (0 if decided is None else 2 * (pairs.sum() - decided.sum()).item() / len(pairs))
    assert (decided is not None) == (name == "sale-int8")


class Logits(nn.Module):
    """A part of what a model gives, which can be exported."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(tokens, use_cache=False).logits
        return logits


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_what_is_exported_counts_nothing(strict: bool, plans: Path, two_layers: PreTrainedModel) -> None:
    """An exported program has no model to report."""
    with patched(two_layers, configurations(plans, layers=2)["quest-kv_group-max-added"]):
        program = torch.export.export(Logits(two_layers), (ids(),), strict=strict).module()
        reset_report(two_layers)
        expected = two_layers(ids(), use_cache=False).logits
        torch.testing.assert_close(program(ids()), expected, atol=1e-4, rtol=1e-4)
        assert [layer.prefill.calls for layer in sparsity_report(two_layers).layers] == [1, 1]


@pytest.mark.parametrize("name", ["streamingllm", "a_shape"])
@torch.no_grad()
def test_prompts_of_any_length_in_one_graph(name: str, plans: Path) -> None:
    model, spans = llama(layers=1), {"method": "streamingllm", "sink": 2, "window": 20}
    with patched(model, {"both": spans} if name == "streamingllm" else configurations(plans)[name]):
        graph = compiled(model, dynamic=True)
        found = {length: graph(ids(length)).logits for length in (90, 70)}
        report = sparsity_report(model)
        reset_report(model)
        sparse = {length: model(ids(length)).logits for length in found}
        if name == "streamingllm":
            assert counted_in_graphs(report) == sparsity_report(model).layers
        assert report.pairs("prefill")[1:] == sparsity_report(model).pairs("prefill")[1:]
    for length, logits in found.items():
        plain = model(ids(length)).logits
        assert not torch.allclose(sparse[length], plain, atol=1e-3) or name == "a_shape"
        torch.testing.assert_close(logits, sparse[length] if name == "streamingllm" else plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SPANS)
@torch.no_grad()
def test_spans_that_follow_from_the_length_in_one_graph(name: str, plans: Path, two_layers: PreTrainedModel) -> None:
    """The first length makes a graph for itself, the second one a graph for any length."""
    lengths = (700, 830, 510)
    with patched(two_layers, configurations(plans, layers=2)[name]):
        expected = [two_layers(ids(length)).logits for length in lengths]
        report = sparsity_report(two_layers)
        reset_report(two_layers)
        graph = compiled(two_layers)
        for length, logits in zip(lengths, expected, strict=True):
            torch.testing.assert_close(graph(ids(length)).logits, logits, atol=1e-4, rtol=1e-4)
        assert counted_in_graphs(sparsity_report(two_layers)) == report.layers


@torch.no_grad()
def test_a_graph_of_before_is_not_run_after(plans: Path, two_layers: PreTrainedModel) -> None:
    """The model is compiled unpatched, then patched, unpatched, and patched with another configuration."""
    graph, plain = compiled(two_layers), two_layers(ids()).logits
    torch.testing.assert_close(graph(ids()).logits, plain)
    for name in ("streamingllm",):
        with patched(two_layers, configurations(plans, layers=2)[name]):
            sparse = two_layers(ids()).logits
            assert not torch.allclose(sparse, plain, atol=1e-3)
            torch.testing.assert_close(graph(ids()).logits, sparse, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(graph(ids()).logits, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not RECENT, reason="generate hands over a mask of ones, which a graph takes for padding")
@pytest.mark.parametrize(
    "name, options",
    [
        ("streamingllm", {"cache_implementation": "static", "disable_compile": True}),
        ("lessismore", {}),
    ],
)
def test_a_compiled_forward_under_generate(name: str, options: dict[str, Any], plans: Path) -> None:
    """With the caches that `generate` makes, prompt and tokens in graphs give the answer of the patched model."""
    model = llama(layers=2)
    options = {**options, "max_new_tokens": 3, "do_sample": False}
    with patched(model, configurations(plans, layers=2)[name], on_unsupported="error"):
        expected = model.generate(ids(), **options)
        before = sparsity_report(model)
        reset_report(model)
        model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")  # type: ignore[method-assign]
        assert torch.equal(model.generate(ids(), **options), expected)
        report = sparsity_report(model)
    assert report.layers[1].compiled and counted_in_graphs(report) == before.layers


@torch.no_grad()
def test_on_unsupported_error_inside_a_graph(plans: Path, two_layers: PreTrainedModel) -> None:
    """The error is PyTorch's, and contains our line."""
    strict = {**configurations(plans, layers=2)["a_shape"], "on_unsupported": "error"}
    with patched(two_layers, strict), pytest.raises(Exception, match="without Triton"):
        compiled(two_layers)(ids())
