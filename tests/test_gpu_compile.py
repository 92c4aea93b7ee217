"""`torch.compile` of a whole patched model on a GPU: every prefill method is sparse inside the graph."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama
from method_table import PREFILL_METHODS, SMALL_MODEL, SPAN_METHODS, TOKEN_METHODS, MethodCase, write_plans
from transformers import PreTrainedModel

from sparse_patch import patched, sparsity_report

pytestmark = pytest.mark.gpu
METHODS = [*PREFILL_METHODS, *SPAN_METHODS, *TOKEN_METHODS]


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> PreTrainedModel:
    return llama(layers=SMALL_MODEL.num_layers).to("cuda", torch.float16)


def settings_of(case: MethodCase, folder: Path) -> dict[str, Any]:
    write_plans(folder, SMALL_MODEL)
    file = case.small.get("calibration")
    return {**case.small, "calibration": str(folder / file)} if file else case.small


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
@torch.no_grad()
def test_prefill_is_sparse_in_a_graph(case: MethodCase, backend: str, model: PreTrainedModel, tmp_path: Path) -> None:
    """Two lengths: the second makes a graph of any length."""
    if backend == "inductor":  # which rounds half precision elsewhere than PyTorch does
        model.float()
    with patched(model, {"prefill": settings_of(case, tmp_path), "on_unsupported": "error"}):
        run = torch.compile(model, backend=backend, fullgraph=True)
        for length in (700, 830):
            ids = torch.randint(3, 90, (2, length), device="cuda")
            expected = model(ids).logits
            torch.testing.assert_close(run(ids).logits, expected, atol=2e-2, rtol=2e-2)
        report = sparsity_report(model)
    assert not report.fallbacks() and all(layer.compiled for layer in report.layers)
    assert sum(layer.prefill.sparse_calls for layer in report.layers) > 0, "nothing was sparse outside of the graph"
