"""`torch.compile` of a whole patched model on a GPU: every prefill method is sparse inside the graph."""

from pathlib import Path

import pytest
import torch
from builders.reports import counted_in_graphs
from families import llama
from method_table import (
    DECODE_METHODS,
    PREFILL_METHODS,
    SMALL_MODEL,
    SPAN_METHODS,
    TOKEN_METHODS,
    MethodCase,
    in_folder,
)
from transformers import PreTrainedModel

from sparse_patch import patched, reset_report, sparsity_report

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_graphs")]
METHODS = [*PREFILL_METHODS, *SPAN_METHODS, *TOKEN_METHODS]


@pytest.fixture
def model() -> PreTrainedModel:
    return llama(layers=SMALL_MODEL.num_layers).to("cuda", torch.float16)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
@torch.no_grad()
def test_prefill_is_sparse_in_a_graph(case: MethodCase, backend: str, model: PreTrainedModel, plans: Path) -> None:
    """Two lengths; the second one makes a graph for any length."""
    if backend == "inductor":  # which rounds half precision elsewhere than PyTorch does
        model.float()
    with patched(model, {"prefill": in_folder(case.small, plans), "on_unsupported": "error"}):
        prompts = [torch.randint(3, 90, (2, length), device="cuda") for length in (700, 830)]
        expected = [model(ids).logits for ids in prompts]
        before = sparsity_report(model)
        reset_report(model)
        run = torch.compile(model, backend=backend, fullgraph=True)
        for ids, logits in zip(prompts, expected, strict=True):
            torch.testing.assert_close(run(ids).logits, logits, atol=2e-2, rtol=2e-2)
        report = sparsity_report(model)
    assert not report.fallbacks() and all(layer.compiled for layer in report.layers)
    for layer, uncompiled in zip(counted_in_graphs(report), before.layers, strict=True):
        assert layer.prefill.sparse_calls == uncompiled.prefill.sparse_calls > 0
        assert layer.prefill.pairs[1:] == uncompiled.prefill.pairs[1:]
        assert layer.prefill.density == pytest.approx(uncompiled.prefill.density, rel=0.02)


@pytest.mark.parametrize("pad", [0, 30])
@pytest.mark.parametrize("case", [*DECODE_METHODS, *SPAN_METHODS, *TOKEN_METHODS], ids=lambda case: case.name)
def test_the_steps_of_a_static_cache_are_counted(
    case: MethodCase, pad: int, model: PreTrainedModel, plans: Path
) -> None:
    """As CUDA graphs of Inductor run them, which `generate` asks for: every replay counts, also after a reset."""
    ids = torch.randint(3, 90, (2, 200), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    with patched(model.float(), {"decode": in_folder(case.small, plans)}):
        model.generate(ids, attention_mask=mask, disable_compile=True, **options)
        before = sparsity_report(model)
        for _ in range(3):
            reset_report(model)
            model.generate(ids, attention_mask=mask, **options)
            report = sparsity_report(model)
            assert report.layers[2].compiled
            for layer, uncompiled in zip(counted_in_graphs(report), before.layers, strict=True):
                assert layer.decode.pairs[1:] == uncompiled.decode.pairs[1:]
                assert layer.decode.attended == pytest.approx(uncompiled.decode.attended, rel=0.02)
                assert (layer.decode.calls, layer.decode.dense) == (7, uncompiled.decode.dense)
