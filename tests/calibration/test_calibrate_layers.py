"""The search for selecting layers: what it measures, chooses and writes, and runs that are killed."""

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import FAMILIES, llama
from rich.table import Table
from transformers import AutoConfig

from sparse_patch.calibration.base import shape_of
from sparse_patch.calibration.layers import choose as choosing
from sparse_patch.calibration.layers.choose import Choice, Curves, choice_of, choose
from sparse_patch.calibration.layers.measure import PROMPTS, Measured, measure, samples_of
from sparse_patch.calibration.layers.search import Found, LayersCalibration
from sparse_patch.calibration.layers.table import curve
from sparse_patch.call import AttentionCall
from sparse_patch.config import load_config
from sparse_patch.errors import TaskError
from sparse_patch.integration.observe import observed
from sparse_patch.integration.patch import is_patched
from sparse_patch.model_shape import ModelShape
from sparse_patch.models.loading import load_model
from sparse_patch.plots import plot_layers
from sparse_patch.workbench.generation import encode
from sparse_patch.workbench.journal import Journal
from sparse_patch.workbench.tasks import Sample

BUDGET = 24
ABOUT = {"model": "tiny", "length": 200, "seed": 0, "budget": BUDGET}


class Tokenizer:
    """A tokenizer with one token per letter."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 80 + 5 for letter in text]}


def sample(number: int) -> Sample:
    generator = torch.Generator().manual_seed(number)
    text = "".join(chr(97 + int(letter)) for letter in torch.randint(0, 26, (200,), generator=generator))
    return Sample(f"task{number}", number, text, "", ["x"], f"{text[40:70]}", 200, 30, False, 0)


def run(path: Path, number: int = 2, model: Any = None, **changes: Any) -> list[Measured]:
    samples = [sample(i) for i in range(number)]
    return measure(model or llama(), Tokenizer(), samples, BUDGET, journal_of(path, **changes))


def journal_of(path: Path, **changes: Any) -> Journal[Measured]:
    return LayersCalibration(**{"length": 200, "budget": BUDGET, **changes}).journal(path, "tiny")


def test_what_is_measured_against_attention_written_out(tmp_path: Path) -> None:
    """Check mass, overlap and jumps against float64 softmax rows over the whole N x N map."""
    model, calls = llama(), list[AttentionCall]()
    found = run(tmp_path / "l.yaml", 1, model)[0]
    tokens, answer = encode(Tokenizer(), sample(0).prompt, sample(0).answer)
    with observed(model, calls.append), torch.no_grad():
        model(torch.tensor([[*tokens, *answer]]))
    assert not is_patched(model) and found.layers == [0, 1, 2] and len(answer) == 30
    positions = torch.linspace(200, 229, 16).round().long()
    maps = []
    for call in calls:
        k = call.k[0].double().repeat_interleave(call.group_size, 0)
        logits = call.q[0].double() @ k.transpose(-1, -2) * call.scale
        above = torch.ones(230, 230, dtype=torch.bool).triu(1)
        maps.append(logits.masked_fill(above, -torch.inf).softmax(-1)[:, positions])
    near = torch.arange(230) < 4, torch.arange(230) > positions[:, None] - 64
    whole, maps = maps, [one.masked_fill(near[0] | near[1], 0) for one in maps]
    assert found.far == pytest.approx([one.sum(-1).mean().item() for one in maps], abs=1e-4)
    for chosen in range(3):
        for layer in range(3):
            if chosen > layer:
                assert found.mass_per_head[chosen][layer] == 0
                continue
            own = [set(row.topk(BUDGET).indices.tolist()) for row in maps[layer].flatten(0, 1)]
            lists = {
                "per_head": maps[chosen].topk(BUDGET).indices,
                "shared": maps[chosen].amax(0).topk(BUDGET).indices.expand(4, -1, -1),
            }
            for kind, keys in lists.items():
                mass = (maps[layer].gather(-1, keys).sum() / maps[layer].sum()).item()
                both = [len(best & set(row.tolist())) for best, row in zip(own, keys.flatten(0, 1), strict=True)]
                assert getattr(found, f"mass_{kind}")[chosen][layer] == pytest.approx(mass, abs=2e-4)
                overlap = sum(both) / len(both) / BUDGET
                assert getattr(found, f"overlap_{kind}")[chosen][layer] == pytest.approx(overlap, abs=2e-3)
    one, other = whole[0].amax(0), whole[1].amax(0)
    cosine = (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))
    assert found.jumps[1] == pytest.approx(1 - cosine.mean().item(), abs=1e-4) and found.jumps[0] == 0


def curves_of(size: int, seed: int = 0) -> Curves:
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.rand(size, size, generator=generator, dtype=torch.float64).triu() for _ in range(4)]
    far = torch.rand(size, generator=generator, dtype=torch.float64).tolist()
    return Curves([3 * layer for layer in range(size)], far, *matrices, jumps=[0.5] * size)


def held(curves: Curves, select: Sequence[int], full: int) -> list[tuple[float, float]]:
    """What each sparse layer finds, and how much of its attention is far, layer by layer."""
    found, last = [], full
    for layer in range(full + 1, len(curves.layers)):
        if layer in select:
            last = layer
        else:
            mass = (curves.mass_per_head[last, layer] + curves.mass_shared[last, layer]).item() / 2
            found.append((mass, curves.far[layer]))
    return found


@pytest.mark.parametrize("reselect", [0, 1, 2, 3])
def test_the_choice_leaves_most_to_the_sparse_layers(reselect: int) -> None:
    curves = curves_of(9)
    choice = choose(curves, reselect)
    means = {
        chosen: sum(mass * far for mass, far in held(curves, chosen, 2))
        / sum(far for _, far in held(curves, chosen, 2))
        for chosen in combinations(range(3, 8), reselect)
    }
    best = max(means, key=lambda chosen: means[chosen])
    assert choice == Choice([0, 3], [6, *(3 * layer for layer in best)], pytest.approx(means[best]), choice.worst)  # type: ignore[arg-type]
    assert choice.worst == pytest.approx(min(1 - far + far * mass for mass, far in held(curves, best, 2)))


def test_many_layers_are_chosen_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = curves_of(12)
    exact = choose(curves, 3)
    monkeypatch.setattr(choosing, "_MOST_SETS", 1)
    greedy = choose(curves, 3)
    assert choose(curves, 1) == max((choice_of(curves, 2, [c]) for c in range(3, 11)), key=lambda c: c.mass)
    assert greedy.select == sorted(set(greedy.select)) and len(greedy.select) == 4
    assert choose(curves, 2).mass <= exact.mass + 1 and greedy.mass <= exact.mass


def test_too_few_layers() -> None:
    with pytest.raises(TaskError, match="--select: the model has 2 layers to choose from, not 3"):
        choose(curves_of(6), 3)
    with pytest.raises(TaskError, match="--model: 3 of its layers can run sparse attention; a search needs 4"):
        choose(curves_of(3), 0)
    assert choose(curves_of(4), 0).select == [6]


def test_a_killed_search_goes_on_and_ends_with_the_same(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole.yaml")
    path, model, steps = tmp_path / "killed.yaml", llama(), list[str]()

    def die(description: str) -> None:
        steps.append(description)
        if description == "task1, prompt 2":
            raise KeyboardInterrupt

    samples = [sample(0), sample(1)]
    with pytest.raises(KeyboardInterrupt):
        measure(model, Tokenizer(), samples, BUDGET, journal_of(path), die)
    assert not is_patched(model)
    journal = tmp_path / "killed.yaml.unfinished"
    assert len(journal.read_text().splitlines()) == 1 + 1
    journal.write_text(journal.read_text() + '{"sample": 1, "ta')  # killed while it wrote
    steps.clear()
    assert measure(model, Tokenizer(), samples, BUDGET, journal_of(path), steps.append) == expected
    assert steps == ["task1, prompt 2"]
    with pytest.raises(TaskError, match="unfinished run with budget 24, this one has 9; delete it or write --out"):
        run(path, budget=9)


def test_layers_with_a_sliding_window_are_left_out(tmp_path: Path) -> None:
    assert run(tmp_path / "g.yaml", 1, FAMILIES["gemma3"]())[0].layers == [2]
    with pytest.raises(TaskError, match="no layer of this model can run sparse attention"):
        run(tmp_path / "m.yaml", 1, FAMILIES["mistral"]())


def test_a_budget_that_is_no_budget() -> None:
    with pytest.raises(TaskError, match="--budget: 200 tokens are all of a prompt of 200; ask for fewer"):
        measure(llama(), Tokenizer(), [sample(0)], 200, Journal(None, ABOUT, None))


@pytest.mark.parametrize("length, budget", [(1024, 160)])
def test_the_layer_of_the_shipped_model_is_found(
    length: int, budget: int, needle_llama_path: Path, tmp_path: Path
) -> None:
    """The search finds layer 5, as in the model card; every prompt and every measure finds it by itself."""
    model, tokenizer = load_model(needle_llama_path)
    samples = samples_of(tokenizer, length, 5, seed=1)
    measured = measure(model, tokenizer, samples, budget, Journal(None, {}, None))
    assert [one.task for one in measured] == list(PROMPTS)
    for one in measured:
        assert choose(Curves.of([one]), 1).select == [2, 5], one.task
    curves = Curves.of(measured)
    choice = choose(curves, 1)
    assert (choice.full, choice.select) == ([0, 1], [2, 5]) and 0 < choice.mass < choice.worst < 1
    rows = list(curve(curves))
    assert [row["layer"] for row in rows] == [3, 4, 5, 6]
    for measure_ in ("mass", "mass_per_head", "mass_shared", "worst_layer", "overlap_per_head", "jump"):
        assert max(rows, key=lambda row: row[measure_])["layer"] == 5, measure_
    path = tmp_path / "layers.yaml"
    calibration, found = LayersCalibration(length, 5, 1, budget), Found(measured, curves, choice)
    calibration.write(path, found, shape_of(model), "needle-llama")
    data = yaml.safe_load(path.read_text())
    sizes = {"model_type": "llama", "num_layers": 8, "num_heads": 8, "num_kv_heads": 2, "hidden_size": 384}
    assert data["artefact"]["model"] == {"id": "needle-llama", **sizes}
    assert data["measured"]["candidates"] == rows and data["artefact"]["settings"]["budget"] == budget
    result = calibration.as_json(found, shape_of(model), "needle-llama")
    assert result["model"] == {key: value for key, value in sizes.items() if key != "num_kv_heads"}
    assert result["measured"]["candidates"] == rows and result["measured"]["budget"] == budget
    assert json.loads(json.dumps(result))["select"] == [2, 5] and len(result["prompts"]) == 5
    plot_layers(result, tmp_path / "l.png")
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")
    drawn = calibration.table(found)[0]
    assert isinstance(drawn, Table) and drawn.row_count == 4


def test_the_artefact_of_the_shipped_model_is_one_that_methods_take(needle_llama_path: Path) -> None:
    path = Path(__file__).parent.parent.parent / "recipes" / "needle-llama" / "layers.yaml"
    data = yaml.safe_load(path.read_text())
    assert (data["full"], data["select"], data["artefact"]["settings"]["length"]) == ([0, 1], [2, 5], 8192)
    shape = ModelShape.of(AutoConfig.from_pretrained(needle_llama_path), 8)
    for method in ("delta", "tidaldecode", "lessismore"):
        decode = load_config({"decode": {"method": method, "calibration": str(path)}}).bind(shape).decode
        assert decode is not None
        assert [decode.role(layer) for layer in range(8)] == [
            *("full", "full", "select", "sparse", "sparse", "select", "sparse", "sparse")
        ]


def test_the_command(tmp_path: Path, needle_llama_path: Path) -> None:
    command = [sys.executable, "-m", "sparse_patch.cli", "calibrate", "layers", "--model", str(needle_llama_path)]
    command += [
        "--length",
        "600",
        "--samples",
        "1",
        "--budget",
        "64",
        "--select",
        "2",
        "--out",
        str(tmp_path / "l.yaml"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "<- chosen" in result.stdout and "\r" not in result.stdout, "no progress bar in a pipe"
    assert [path.name for path in tmp_path.iterdir()] == ["l.yaml"]
    data = yaml.safe_load((tmp_path / "l.yaml").read_text())
    load_config({"decode": {"method": "delta", "calibration": str(tmp_path / "l.yaml")}})
    assert data["full"] == [0, 1] and len(data["select"]) == 3 and data["artefact"]["settings"]["samples"] == 1
