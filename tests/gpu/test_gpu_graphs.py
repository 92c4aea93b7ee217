"""Decode steps as CUDA graphs on a GPU; `tests/integration/graphs` has the details, with a stand-in for graphs."""

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from builders.stepping import generated, prompt, stepped
from families import llama
from method_table import CORRECTED, SMALL_MODEL, configurations
from together import at_once
from transformers import PreTrainedModel

from sparse_patch import growing_cache, patched, span_cache, sparsity_report

pytestmark = pytest.mark.gpu
QUEST = {"decode": {"method": "quest", "budget": 48, "page_size": 8, "min_length": 0, "layers": "all"}}


@pytest.fixture
def model() -> PreTrainedModel:
    return llama(layers=SMALL_MODEL.num_layers).to("cuda", torch.float16)


def on_gpu(*args: Any, **kwargs: Any) -> torch.Tensor:
    return prompt(*args, **kwargs).to("cuda")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", list(configurations(Path())))
def test_every_method_gives_the_same_by_graphs(name: str, rows: int, plans: Path, model: PreTrainedModel) -> None:
    ids = on_gpu(230, rows=rows)
    mask = torch.ones_like(ids)
    mask[1:, :40] = 0
    found = []
    for decode_graph in ("off", "auto"):
        with patched(model, configurations(plans)[name], decode_graph=decode_graph, on_unsupported="error"):
            found.append((generated(model, ids, 200, attention_mask=mask), sparsity_report(model)))
    (eager, of_eager), (by_graph, of_graph) = found
    assert torch.equal(by_graph, eager)
    assert of_graph.graphs.captures >= 1
    assert of_graph.graphs.replays >= 190
    for one, other in zip(of_graph.layers, of_eager.layers, strict=True):
        assert (one.decode.calls, one.decode.pairs) == (other.decode.calls, other.decode.pairs)


@pytest.mark.parametrize("period", [1, 20])
def test_corrections_run_on_our_own_kernel(period: int, model: PreTrainedModel) -> None:
    """PyTorch's own attention would be cuDNN's on Hopper, which gives other last bits now and then."""
    with patched(model, {"decode": {**CORRECTED.small, "correction_period": period}}):
        found = [generated(model, on_gpu(230, rows=2), 64) for _ in range(3)]
        layers = sparsity_report(model).layers
    assert all(torch.equal(found[0], other) for other in found[1:])
    for layer in layers:
        phases = layer.prefill, layer.decode
        assert sum(phase.dense_kernels.get("page_decode", 0) for phase in phases) >= len(found) * (62 // period)
        dense = sum(sum(phase.dense.values()) - sum(phase.dense_kernels.values()) for phase in phases)
        assert dense == len(found), "only the prompts"


def test_growing_rooms_and_a_chat(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_patch.integration.caches.layers.SPARE", 4)
    found = []
    for decode_graph in ("off", "auto"):
        with patched(model, QUEST, decode_graph=decode_graph):
            cache = growing_cache(model.config)
            turns = [stepped(model, on_gpu(40 + turn, seed=turn), 50, cache) for turn in range(3)]
            found.append(torch.cat(turns, 1))
            captures = sparsity_report(model).graphs.captures
    assert torch.equal(*found)
    assert captures > 3


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gemma4", "mistral", "qwen2_windowed"])
def test_windows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row is padded by more than a window, and the tokens move to the front of their rooms every few steps."""
    monkeypatch.setattr("sparse_patch.integration.step.SPARE", 16)
    model = getattr(families, name)().to("cuda", torch.bfloat16)
    ids = on_gpu(60, rows=3)
    mask = torch.ones_like(ids)
    mask[1, :50] = mask[2, :7] = 0
    found = []
    for decode_graph in ("off", "auto"):
        with patched(model, QUEST, decode_graph=decode_graph):
            found.append((generated(model, ids, 100, attention_mask=mask), sparsity_report(model)))
    (eager, of_eager), (by_graph, of_graph) = found
    assert torch.equal(by_graph, eager)
    assert not of_graph.graphs.eager
    assert of_graph.graphs.captures <= 2 and of_graph.graphs.replays >= 95
    for one, other in zip(of_graph.layers, of_eager.layers, strict=True):
        assert (one.decode.calls, one.decode.pairs) == (other.decode.calls, other.decode.pairs)


@pytest.mark.parametrize("config", ["quest", "streamingllm"])
def test_threads_capture_and_replay(config: str, plans: Path, model: PreTrainedModel) -> None:
    settings = next(value for name, value in configurations(plans).items() if name.startswith(config))
    prompts = [on_gpu(200 + 20 * i, rows=1 + i % 2, seed=i) for i in range(4)]
    with patched(model, settings, decode_graph="off"):
        expected = [generated(model, ids, 60) for ids in prompts]
    with patched(model, settings):
        found = at_once([lambda ids=ids: generated(model, ids, 60) for ids in prompts])
        assert sparsity_report(model).graphs.captures == 4
    assert all(map(torch.equal, found, expected))


def test_a_forward_that_waits_for_the_gpu_runs_eagerly(model: PreTrainedModel) -> None:
    module, ids = model.model.layers[2].mlp, on_gpu(200)
    inner = module.forward

    def waiting(x: torch.Tensor) -> torch.Tensor:
        assert x.abs().max().item() >= 0
        return inner(x)

    module.forward = waiting
    with patched(model, QUEST, decode_graph="off"):
        expected = generated(model, ids, 20)
    with patched(model, QUEST):
        found, graphs = generated(model, ids, 20), sparsity_report(model).graphs
        assert graphs.replays == 0
        (reason,) = graphs.eager
        assert reason.startswith("the step failed")
        module.forward = inner
        assert generated(model, ids, 20).isfinite().all(), "the GPU goes on"
        assert sparsity_report(model).graphs.captures == 1
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_memory_is_free_when_the_cache_is_gone(model: PreTrainedModel) -> None:
    ids = on_gpu(200)
    with patched(model, QUEST):
        stepped(model, ids, 20)
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            stepped(model, ids, 20, span_cache(model, 300))
        assert torch.cuda.memory_allocated() <= before + 2**20
