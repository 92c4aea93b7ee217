"""`torch.compile` of whole patched models, as one graph. test_gpu_compile.py tests what is sparse on a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import RECENT, llama
from method_table import TWO_LAYERS, configurations, write_plans
from torch import nn
from transformers import PreTrainedModel, StaticCache

from sparse_patch import patched, sparsity_report
from sparse_patch.report import SparsityReport

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


def compiled(model: nn.Module, **options: Any) -> Any:
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
    """Spans are read sparsely. Other methods are dense as in the unpatched model; each layer counts the reason once."""
    inputs, reason = ways(two_layers)[way]
    expected = two_layers(ids(), **inputs).logits
    config = configurations(plans, layers=2)[name]
    with patched(two_layers, config):
        sparse = two_layers(ids(), **ways(two_layers)[way][0]).logits
        found = compiled(two_layers)(ids(), **ways(two_layers)[way][0]).logits
        report = sparsity_report(two_layers)
    runs_sparsely = name in SPANS and not reason
    torch.testing.assert_close(found, sparse if runs_sparsely else expected, atol=1e-4, rtol=1e-4)
    if "decode" in config:  # prompts are dense by design
        assert fallbacks(report) == [{}] * 2 and torch.allclose(sparse, expected, atol=1e-4)
        return
    assert fallbacks(report) == [{} if runs_sparsely else {reason or WITHOUT_KERNELS: 1}] * 2
    assert not torch.allclose(sparse, expected, atol=1e-3), "something was left out"


@torch.no_grad()
def test_the_reason_is_counted_once_however_often_a_graph_runs(plans: Path, two_layers: PreTrainedModel) -> None:
    with patched(two_layers, configurations(plans, layers=2)["a_shape"]):
        graph = compiled(two_layers)
        for _ in range(3):
            graph(ids())
        assert fallbacks(sparsity_report(two_layers)) == [{WITHOUT_KERNELS: 1}] * 2


@pytest.mark.parametrize("name", ["streamingllm", "a_shape"])
@torch.no_grad()
def test_prompts_of_any_length_in_one_graph(name: str, plans: Path) -> None:
    model, spans = llama(layers=1), {"method": "streamingllm", "sink": 2, "window": 20}
    with patched(model, {"both": spans} if name == "streamingllm" else configurations(plans)[name]):
        graph = compiled(model, dynamic=True)
        found = {length: graph(ids(length)).logits for length in (90, 70)}
        sparse = {length: model(ids(length)).logits for length in found}
    for length, logits in found.items():
        plain = model(ids(length)).logits
        assert not torch.allclose(sparse[length], plain, atol=1e-3) or name == "a_shape"
        torch.testing.assert_close(logits, sparse[length] if name == "streamingllm" else plain, atol=1e-4, rtol=1e-4)


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
        before = sparsity_report(model).layers[1].decode.calls
        model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")  # type: ignore[method-assign]
        assert torch.equal(model.generate(ids(), **options), expected)
        layer = sparsity_report(model).layers[1]
    assert layer.compiled and layer.decode.calls == before, "the steps ran in graphs"


@torch.no_grad()
def test_on_unsupported_error_inside_a_graph(plans: Path, two_layers: PreTrainedModel) -> None:
    """The error is PyTorch's, and contains our line."""
    strict = {**configurations(plans, layers=2)["a_shape"], "on_unsupported": "error"}
    with patched(two_layers, strict), pytest.raises(Exception, match="without Triton"):
        compiled(two_layers)(ids())
