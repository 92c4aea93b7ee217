"""Threads that share a patched model on a GPU: every method, 24 generations each."""

from pathlib import Path

import pytest
import torch
from families import llama
from method_table import SMALL_MODEL, configurations
from together import prompts, wrong_answers

from sparse_patch import patched, sparsity_report

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", list(configurations(Path())))
def test_threads_answer_what_one_thread_does(name: str, plans: Path) -> None:
    model = llama(layers=SMALL_MODEL.num_layers).to("cuda", torch.float16)
    with patched(model, {**configurations(plans)[name], "on_unsupported": "error"}):
        assert wrong_answers(model, prompts([260, 200, 300, 231], device="cuda"), new=6, rounds=6) == []
        layer = sparsity_report(model).layers[1]
    assert layer.prefill.sparse_calls + layer.decode.sparse_calls > 0, "nothing was sparse"
