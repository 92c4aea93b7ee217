"""The search for head patterns: what it finds, what it writes, and runs that are killed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, llama

from sparse_patch import patched, sparsity_report
from sparse_patch.artefacts.patterns import Pattern
from sparse_patch.calibration.base import shape_of
from sparse_patch.calibration.minference import LayerPatterns, MInferenceCalibration, candidates, search, table
from sparse_patch.call import AttentionCall
from sparse_patch.errors import TaskError
from sparse_patch.integration.observe import observed
from sparse_patch.integration.patch import is_patched
from sparse_patch.methods.minference import BoundMInference, MInference
from sparse_patch.ops.attention.block_sparse import attend
from sparse_patch.workbench.journal import Journal

LENGTH = 500
METHOD = MInference(block_size=16, min_length=0)
ABOUT = {"model": "tiny", "length": LENGTH, "seed": 0}
CALIBRATION = MInferenceCalibration(LENGTH)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    ids: list[int] = torch.randint(3, 90, (LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    return ids


def run(path: Path, tokens: Sequence[int], model: Any = None, **changes: Any) -> list[LayerPatterns]:
    return search(model or llama(), tokens, journal_of(path, **changes), method=METHOD)


def journal_of(path: Path, **changes: Any) -> Journal[LayerPatterns]:
    return MInferenceCalibration(LENGTH, **changes).journal(path, "tiny")


def test_candidates_are_the_papers_and_shrink_with_the_prompt() -> None:
    assert candidates(30_000) == candidates(200_000)
    assert candidates(30_000)[2] == Pattern("vertical_and_slash", 500, 1500)
    assert candidates(15_000)[4] == Pattern("stream_llm", 512, 2048)
    assert candidates(3_000)[:3] == (
        Pattern("vertical_and_slash", 30, 205),
        Pattern("vertical_and_slash", 30, 180),
        Pattern("vertical_and_slash", 50, 150),
    )
    assert len(set(candidates(100))) == len(candidates(100))


def test_the_chosen_pattern_changes_each_head_least(tmp_path: Path) -> None:
    """Check against explicit attention: a float64 softmax under the mask of each candidate."""
    length = 1200  # of which not all heads choose the same
    tokens = torch.randint(3, 90, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    model, calls = llama(), list[AttentionCall]()
    with observed(model, calls.append), torch.no_grad():
        model(torch.tensor([tokens]))
    assert [call.layer for call in calls] == [0, 1, 2] and not is_patched(model)
    found = run(tmp_path / "p.json", tokens)
    chosen = set()
    for call, layer in zip(calls, found, strict=True):
        k, v = (x.double().repeat_interleave(call.group_size, 1) for x in (call.k, call.v))
        logits = call.q.double() @ k.transpose(-1, -2) * call.scale
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        dense = logits.masked_fill(~causal, -torch.inf).softmax(-1) @ v
        errors = []
        for choice in candidates(length):
            mask = METHOD.plan_by(call, (choice,) * 4).mask()  # type: ignore[union-attr]
            output = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v
            errors.append((output - dense).flatten(2).norm(dim=-1) / dense.flatten(2).norm(dim=-1))
        smallest, number = torch.cat(errors).min(0)
        for head in range(4):
            assert tuple(layer.heads[head][:3]) == candidates(length)[int(number[head])]
            assert layer.heads[head][3] == pytest.approx(smallest[head].item(), abs=2e-5)
            chosen.add(int(number[head]))
    assert len(chosen) > 1, "the test would not see a wrong choice"


def test_what_is_written_loads_back_and_runs(tokens: list[int], tmp_path: Path) -> None:
    path, model = tmp_path / "p.json", llama()
    found = run(path, tokens, model)
    CALIBRATION.write(path, found, shape_of(model), "tiny")
    data = json.loads(path.read_text())
    header = data["artefact"]
    assert (header["kind"], header["model"]["id"], header["settings"]) == ("minference", "tiny", CALIBRATION.settings)
    data = data["layers"]
    assert len(data) == 3 and list(data[0]) == ["0", "1", "2", "3"] and len(data[0]["0"]) == 4
    method = MInference(calibration=str(path)).bind(shape_of(model))
    assert isinstance(method, BoundMInference)
    for layer in found:
        assert [tuple(entry[:3]) for entry in layer.heads] == list(method.patterns(layer.layer, 4))
    settings = {"calibration": str(path), "block_size": 16, "min_length": 0}
    with torch.no_grad(), patched(model, "minference", prefill=settings):
        model(torch.tensor([tokens]))
        report = sparsity_report(model)
    assert report.fallbacks() == {} and all(layer.prefill.sparse_calls == 1 for layer in report.layers)
    assert table(found, LENGTH).row_count == len(candidates(LENGTH))


def test_a_killed_search_goes_on_and_ends_with_the_same(
    tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tmp_path / "whole.json", tokens)
    path, model, measured = tmp_path / "killed.json", llama(), []

    def die(description: str) -> None:
        measured.append(description)
        if description == "layer 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, tokens, journal_of(path), die, METHOD)
    assert not is_patched(model)
    journal = tmp_path / "killed.json.unfinished"
    assert len(journal.read_text().splitlines()) == 1 + 2
    journal.write_text(journal.read_text() + '{"layer": 2, "hea')  # killed while it wrote
    measured.clear()
    assert search(model, tokens, journal_of(path), measured.append, METHOD) == expected
    assert measured == ["layer 2"]


def test_a_journal_of_another_search_is_refused(tokens: list[int], tmp_path: Path) -> None:
    run(tmp_path / "p.json", tokens)
    with pytest.raises(TaskError, match=r"unfinished run with seed 0, this one has 1; delete it or write --out"):
        run(tmp_path / "p.json", tokens, seed=1)
    (tmp_path / "q.json.unfinished").write_text("some text\n")
    with pytest.raises(TaskError, match="is no journal of an unfinished run; delete it or write --out elsewhere"):
        run(tmp_path / "q.json", tokens)


def test_layers_that_stay_dense_are_left_out(tokens: list[int], tmp_path: Path) -> None:
    found = run(tmp_path / "p.json", tokens, FAMILIES["gemma3"]())
    assert [layer.layer for layer in found] == [2]
    CALIBRATION.write(tmp_path / "p.json", found, shape_of(FAMILIES["gemma3"]()), "gemma3")
    assert [len(heads) for heads in json.loads((tmp_path / "p.json").read_text())["layers"]] == [0, 0, 2]
    with pytest.raises(TaskError, match="no layer of this model can run sparse attention"):
        run(tmp_path / "m.json", tokens, FAMILIES["mistral"]())


def test_a_prompt_that_is_too_short(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"--length: 100 tokens are too few for a search: vertical_and_slash 30, 100"):
        run(tmp_path / "p.json", [5] * 100)


def test_the_model_stays_dense_while_it_is_observed(tokens: list[int]) -> None:
    model, ids = llama(), torch.tensor([tokens])
    with torch.no_grad():
        expected = model(ids).logits
        with observed(model, lambda call: attend(call, METHOD.plan_by(call, candidates(LENGTH)[:1] * 4))):  # type: ignore[arg-type]
            assert torch.equal(model(ids).logits, expected)


def test_a_journal_in_memory_needs_no_file(tokens: list[int]) -> None:
    assert len(search(llama(), tokens, Journal(None, ABOUT, None), method=METHOD)) == 3
