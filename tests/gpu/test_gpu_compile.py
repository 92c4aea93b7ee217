"""`torch.compile` of a whole patched model on a GPU: every prefill method is sparse inside the graph."""

from pathlib import Path

import pytest
import torch
from families import llama
from method_table import PREFILL_METHODS, SMALL_MODEL, SPAN_METHODS, TOKEN_METHODS, MethodCase, in_folder
from transformers import PreTrainedModel

from sparse_patch import patched, sparsity_report

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
        run = torch.compile(model, backend=backend, fullgraph=True)
        for length in (700, 830):
            ids = torch.randint(3, 90, (2, length), device="cuda")
            expected = model(ids).logits
            torch.testing.assert_close(run(ids).logits, expected, atol=2e-2, rtol=2e-2)
        report = sparsity_report(model)
    assert not report.fallbacks() and all(layer.compiled for layer in report.layers)
    assert sum(layer.prefill.sparse_calls for layer in report.layers) > 0, "nothing was sparse outside of the graph"
