"""The search for SALE's thresholds: what it finds, what it writes, and runs that are killed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, llama

from sparse_patch import patched, sparsity_report
from sparse_patch.artefacts.thresholds import read_thresholds
from sparse_patch.calibration.prompts import generated_prompts, text_prompts
from sparse_patch.calibration.sale import HIGHEST, LOWEST, LayerThresholds, SaleCalibration, search, table, thresholds
from sparse_patch.call import AttentionCall
from sparse_patch.errors import TaskError
from sparse_patch.integration.observe import observed
from sparse_patch.integration.patch import is_patched
from sparse_patch.methods.sale import Sale
from sparse_patch.model_shape import ModelShape
from sparse_patch.models.loading import load_model, load_tokenizer
from sparse_patch.workbench.journal import Journal

LENGTH = 480
METHOD = Sale(window=32, block_size=64, min_length=0)
ABOUT = {"model": "tiny"}
CALIBRATION = SaleCalibration(window=32, block_size=64, error=0.01)
ERROR = 0.01  # of these layers' outputs: some heads pass at once, others are halved


@pytest.fixture(scope="module")
def model() -> Any:
    """The first layers of needle-llama, because with random weights all keys get similar attention."""
    loaded, _ = load_model("examples/needle-llama")
    loaded.model.layers = loaded.model.layers[:3]
    loaded.config.num_hidden_layers = 3
    return loaded


@pytest.fixture(scope="module")
def prompts(model: Any) -> list[list[int]]:
    return generated_prompts(model, load_tokenizer("examples/needle-llama"), ["niah_multikey_1"], [LENGTH], 2, seed=0)


def run(
    model: Any, prompts: Sequence[Sequence[int]], error: float = ERROR, highest: float = HIGHEST
) -> list[LayerThresholds]:
    return search(model, prompts, error, Journal(None, ABOUT, None), method=METHOD, highest=highest)


@pytest.fixture(scope="module")
def found(model: Any, prompts: list[list[int]]) -> list[LayerThresholds]:
    """The result after the first prompt."""
    return run(model, prompts[:1])


@pytest.fixture(scope="module")
def after_both(model: Any, prompts: list[list[int]]) -> list[LayerThresholds]:
    return run(model, prompts)


def of_heads(found: Sequence[LayerThresholds]) -> torch.Tensor:
    return torch.tensor([layer.tau for layer in found])


def test_each_head_has_the_largest_threshold_that_keeps_its_error(
    model: Any, prompts: list[list[int]], found: list[LayerThresholds]
) -> None:
    """Check against explicit attention: a float64 softmax under the mask of each threshold."""
    calls = list[AttentionCall]()
    with observed(model, calls.append), torch.no_grad():
        model(torch.tensor(prompts[:1]))
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    seen = set()
    for call, layer in zip(calls, found, strict=True):
        k, v = (x.double().repeat_interleave(call.group_size, 1) for x in (call.k, call.v))
        logits = call.q.double() @ k.transpose(-1, -2) * call.scale
        dense = logits.masked_fill(~causal, -torch.inf).softmax(-1) @ v
        tau, expected = HIGHEST, torch.full((call.q.shape[1],), -1.0)
        while tau > LOWEST:
            mask = METHOD.plan_at(call, torch.full((call.q.shape[1],), tau)).mask()  # type: ignore[union-attr]
            output = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v
            change = (output - dense).abs().sum(-1).mean((0, 2))
            expected = expected.where((expected >= 0) | (change >= ERROR), tau)
            tau /= 2
        assert layer.tau == pytest.approx(expected.clamp(min=0).tolist())
        seen |= set(layer.tau)
        for threshold, error in zip(layer.tau, layer.error, strict=True):
            assert error < ERROR and (threshold > 0 or error == 0)
    assert len(seen) > 2, "the test would not see a wrong threshold"


def test_a_larger_error_raises_thresholds_and_more_prompts_never_do(
    model: Any, prompts: list[list[int]], found: list[LayerThresholds], after_both: list[LayerThresholds]
) -> None:
    tight, loose = of_heads(found), of_heads(run(model, prompts[:1], 4 * ERROR))
    assert bool((loose >= tight).all()) and bool((loose > tight).any())
    assert bool((of_heads(after_both) <= tight).all())
    assert of_heads(run(model, [prompts[0][:200]], 0.0)).max() == 0, "nothing is within no error"
    higher = of_heads(run(model, prompts[:1], 4 * ERROR, 64 * HIGHEST))
    assert bool((higher >= loose).all()) and higher.max() > HIGHEST


def test_what_is_written_loads_back_and_runs(
    model: Any, prompts: list[list[int]], after_both: list[LayerThresholds], tmp_path: Path
) -> None:
    path, found = tmp_path / "tau.safetensors", after_both
    shape = ModelShape.of(model.config, 3)
    CALIBRATION.write(path, found, shape, "tiny")
    read = read_thresholds(path)
    assert torch.equal(read.tau, of_heads(found)) and read.header == CALIBRATION.header(shape, "tiny")
    settings = {"calibration": str(path), "window": 32, "block_size": 64, "min_length": 0}
    with torch.no_grad(), patched(model, "sale", prefill=settings):
        model(torch.tensor(prompts[1:]))
        report = sparsity_report(model)
    assert report.fallbacks() == {}
    for layer, measured in zip(report.layers, found, strict=True):
        if max(measured.tau) > 0:
            assert layer.prefill.density_by_head == pytest.approx(measured.density, abs=1e-6)
    assert table(found, ERROR).row_count == 3


def test_a_killed_search_goes_on_and_ends_with_the_same(
    model: Any, prompts: list[list[int]], after_both: list[LayerThresholds], tmp_path: Path
) -> None:
    path, measured = tmp_path / "tau", list[str]()

    def die(description: str) -> None:
        measured.append(description)
        if description == "prompt 2, layer 1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, prompts, ERROR, CALIBRATION.journal(path, "tiny"), die, METHOD)
    assert not is_patched(model)
    measured.clear()
    assert search(model, prompts, ERROR, CALIBRATION.journal(path, "tiny"), measured.append, METHOD) == after_both
    assert measured == ["prompt 2, layer 1", "prompt 2, layer 2"]
    with pytest.raises(TaskError, match="unfinished run with model 'tiny', this one has 'other'"):
        CALIBRATION.journal(path, "other")


def test_layers_that_stay_dense_have_no_threshold() -> None:
    prompts = [torch.randint(3, 90, (200,), generator=torch.Generator().manual_seed(0)).tolist()]
    found = run(FAMILIES["gemma3"](), prompts, 100.0)
    assert [layer.layer for layer in found] == [2]
    assert thresholds(found, 3, 2).amax(1).tolist() == [0, 0, pytest.approx(HIGHEST)]
    with pytest.raises(TaskError, match="no layer of this model can run sparse attention"):
        run(FAMILIES["mistral"](), prompts)
    with pytest.raises(TaskError, match="--lengths: 100 tokens are too few for a search: no longer than the 160"):
        run(llama(), [[5] * 100])


def test_prompts_are_generated_or_cut_from_a_text(model: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("examples/needle-llama")
    made = generated_prompts(model, tokenizer, ["kv_retrieval", "vt"], [400, 300], 2, seed=0)
    assert [len(prompt) for prompt in made] == [400, 400, 300, 300] and made[0] != made[1]
    text = tmp_path / "mine.txt"
    text.write_text("A text of my own, about this and that. " * 40)
    cut = text_prompts(model, tokenizer, text, [100, 50], 2)
    assert [len(prompt) for prompt in cut] == [100, 100, 50, 50] and cut[0][1:9] != cut[1][:8]
    with pytest.raises(TaskError, match=r"mine\.txt: has \d+ tokens, 90 pieces of each length need 9000"):
        text_prompts(model, tokenizer, text, [100], 90)
    with pytest.raises(TaskError, match=r"--text: .*none\.txt: cannot be read"):
        text_prompts(model, tokenizer, tmp_path / "none.txt", [100], 1)
