"""The search for MoA's head schedules from end to end: what it measures, chooses and writes, and killed runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.model_state import fingerprint
from calls import make_call
from families import FAMILIES, llama
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_patch.artefacts.base import check_shape
from sparse_patch.artefacts.head_schedules import HeadSchedules, read_head_schedules
from sparse_patch.calibration.moa import search as module
from sparse_patch.calibration.moa.hook import attention_by
from sparse_patch.calibration.moa.influence import answer_loss, dense_attention
from sparse_patch.calibration.moa.prompts import ANSWER, Prompt, answer_of, pieces, task_prompts
from sparse_patch.calibration.moa.records import Settings
from sparse_patch.calibration.moa.report import Found, as_json, spans_table, table
from sparse_patch.calibration.moa.search import MoACalibration, search
from sparse_patch.calibration.moa.validate import loss_under
from sparse_patch.errors import TaskError
from sparse_patch.model_shape import ModelShape
from sparse_patch.models.loading import load_tokenizer
from sparse_patch.ops.attention import span
from sparse_patch.plans import SpanPlan
from sparse_patch.plots import plot_spans
from sparse_patch.workbench.journal import Journal

SMALL = Settings(lengths=(512, 704), validate_length=832, samples=2, validate_samples=1, plans=2, tasks=("vt",))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("examples/needle-llama")


def tiny(**changes: Any) -> Any:
    """A random Llama with the vocabulary of needle-llama."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 4096, "initializer_range": 0.3, "max_position_embeddings": 1024}
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


@pytest.fixture(scope="module")
def found(tokenizer: Any) -> Found:
    return search(tiny(), tokenizer, SMALL, Journal(None, {}, None))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_plan_that_keeps_everything_loses_what_the_model_does(family: str) -> None:
    model = FAMILIES[family]()
    shape = ModelShape.of(model.config, model.config.num_hidden_layers)
    prompt = Prompt("x", torch.randint(3, 90, (190,)).tolist(), [5, 6, 7])
    with torch.no_grad():
        expected = float(answer_loss(model, prompt.tokens, prompt.answer))
    rules = [[0.0] * shape.num_kv_heads] * shape.num_layers
    full = HeadSchedules.of(shape, rules, [[1.0] * shape.num_kv_heads] * shape.num_layers)
    before = fingerprint(model)
    assert loss_under(model, None, 193, prompt) == pytest.approx(expected, rel=1e-4)
    assert loss_under(model, full, 193, prompt) == pytest.approx(expected, rel=1e-4)
    short = full.model_copy(update={"betas": rules})
    assert loss_under(model, short, 193, prompt) != pytest.approx(expected, rel=1e-4)
    assert fingerprint(model) == before


def test_the_loss_of_a_plan_is_that_of_the_model_under_its_mask() -> None:
    """Check through a whole model, with an explicit 4-D mask for each query head."""
    model = llama()
    shape = ModelShape.of(model.config, 3)
    rules = HeadSchedules.of(shape, [[0, 0], [0, 192], [128, 0]], [[0, 1], [0.5, 0], [0, 0.8]])
    prompt = Prompt("x", torch.randint(3, 90, (240,)).tolist(), [5, 6, 7])
    i, j = torch.arange(242)[:, None], torch.arange(242)

    def attend(call: Any, dense: Any) -> torch.Tensor:
        sinks, windows = rules.spans(call.layer, 243)
        seen = torch.stack([(j <= i) & ((j < s) | (i - j < w)) for s, w in zip(sinks, windows, strict=True)])
        k, v = (x.repeat_interleave(2, 1) for x in (call.k, call.v))
        logits = (call.q @ k.transpose(-1, -2) * call.scale).masked_fill(~seen.repeat_interleave(2, 0), -torch.inf)
        return (logits.softmax(-1) @ v).transpose(1, 2)

    with attention_by(model, attend), torch.no_grad():
        expected = float(answer_loss(model, prompt.tokens, prompt.answer))
    assert loss_under(model, rules, 243, prompt) == pytest.approx(expected, rel=1e-4)


def test_dense_attention_needs_no_mask() -> None:
    call = make_call(150, heads=(4, 2), head_dim=16)
    torch.testing.assert_close(
        dense_attention(call), span.attend(call, SpanPlan.of(call, [0, 0], [None, None]))[0], atol=1e-5, rtol=1e-4
    )


def test_prompts_and_answers(tokenizer: Any, tmp_path: Path) -> None:
    made = task_prompts(tokenizer, ["vt", "recite"], 768, 4, seed=0, answers="task")
    assert [one.task for one in made] == ["vt", "recite"] * 2 or [one.task for one in made] == ["recite", "vt"] * 2
    assert all(len(one.tokens) == 768 - ANSWER and 0 < len(one.answer) <= ANSWER for one in made)
    assert made[0].tokens != made[2].tokens and task_prompts(tokenizer, ["vt"], 768, 1, 0, "model")[0].answer == []
    (tmp_path / "mine.txt").write_text("A text of my own, about this and that. " * 400)
    model = tiny()
    cut = pieces(model, tokenizer, tmp_path / "mine.txt", [512, 512, 768])
    assert [len(one.tokens) for one in cut] == [384, 384, 640] and cut[0].tokens != cut[1].tokens
    answer = answer_of(model, tokenizer, cut[0].tokens)
    with torch.no_grad():
        ids = torch.tensor([[*cut[0].tokens, *answer]])
        greedy = model(ids).logits[0, 383:-1].argmax(-1).tolist()
    assert answer == greedy[: len(answer)] and (len(answer) == ANSWER or answer[-1] in (0, 1, 2))


def test_a_plan_is_found(found: Found, tmp_path: Path) -> None:
    profile = found.profile
    assert profile.layers == [0, 1] and {n: c.shape for n, c in profile.curves.items()} == {
        512: (2, 2, 8),
        704: (2, 2, 11),
        832: (2, 2, 13),
    }
    seen, unseen = profile.curves[704], profile.curves[832]
    assert (unseen[..., 6] == seen[..., 5]).all() and (unseen[..., -1] == seen[..., -1]).all()
    for plan in found.plans:
        assert (
            0.45 - 1e-9 <= min(plan.densities) <= max(plan.densities) <= 0.5 + 1e-9
            and len(plan.densities) == 3
            and len(plan.predicted) == 3
        )
    scored = [plan for plan in found.plans if plan.loss is not None]
    assert 1 <= len(scored) <= 2 and found.chosen.loss == min(plan.loss for plan in scored if plan.loss is not None)
    assert [one.name for one in found.baselines] == [
        "one span",
        "dealt at random",
        "full or streaming",
        "a rule a layer",
    ]
    one_span, dealt, streaming, by_layer = found.baselines
    share = found.chosen.densities[-1]
    assert dealt.densities[-1] == pytest.approx(share) and abs(one_span.densities[-1] - share) <= 64 / 832
    assert abs(streaming.densities[-1] - share) <= 0.25 and max(by_layer.densities) <= 0.5 + 1e-9
    assert all(
        len(set(zip(*row, strict=True))) == 1 for row in zip(by_layer.rules.alphas, by_layer.rules.betas, strict=True)
    )
    best = min(found.plans, key=lambda plan: plan.predicted[2])
    for one in (one_span, by_layer):
        if min(one.densities) >= 0.45 and max(one.densities) <= 0.5:
            assert best.predicted[2] <= one.predicted[2] + 1e-9, "nothing within the density loses less"
    path = tmp_path / "plan.json"
    MoACalibration(SMALL).write(path, found, profile.shape, "tiny")
    read = read_head_schedules(path)
    check_shape(read.header, profile.shape, "schedules")
    assert read.alphas == found.chosen.rules.alphas and read.measured["validated"]["plan"] == found.chosen.loss
    made = read.header.settings
    assert made["lengths"] == [512, 704] and made["validate_length"] == 832 and read.header.model.id == "tiny"


def test_tables_json_and_picture(found: Found, tmp_path: Path) -> None:
    data = json.loads(json.dumps(as_json(found)))
    assert data["spans"]["512"] == [[min(k, 512) for k in found.chosen.rules.kept(n, 512)] for n in (0, 1)]
    plans = [loss for loss in data["frontier"]["plan"] if loss is not None]
    assert len(plans) > 5 and plans == sorted(plans, reverse=True), "more is never worse"
    assert table(found).row_count == len(found.plans) + 4 and spans_table(found).row_count == 2
    plot_spans(data, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_search_goes_on_and_ends_with_the_same(tokenizer: Any, tmp_path: Path, found: Found) -> None:
    path, model, steps = tmp_path / "plan.json", tiny(), list[str]()

    def die(description: str) -> None:
        steps.append(description)
        if description.startswith("plan"):
            raise KeyboardInterrupt

    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        search(model, tokenizer, SMALL, MoACalibration(SMALL).journal(path, "tiny"), die)
    assert fingerprint(model) == before and len(steps) == 4 + 1 + 1
    steps.clear()
    again = search(model, tokenizer, SMALL, MoACalibration(SMALL).journal(path, "tiny"), steps.append)
    assert fingerprint(model) == before
    assert again.chosen.rules.alphas == found.chosen.rules.alphas and again.chosen.loss == found.chosen.loss
    assert steps[0].startswith("plan") and len(steps) <= 2 + 4 and len(steps) <= SMALL.steps
    with pytest.raises(TaskError, match="unfinished run with seed 0, this one has 1; delete it or write --out"):
        MoACalibration(replace(SMALL, seed=1)).journal(path, "tiny")


def test_the_model_answers_and_texts_are_read(tokenizer: Any, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(Path(module.__file__).read_text() * 3)
    settings = Settings(
        lengths=(512,), validate_length=576, samples=1, validate_samples=1, plans=1, text=str(text), influence="moa"
    )
    journal: Journal[Any] = Journal(None, {}, None)
    result = search(tiny(), tokenizer, settings, journal)
    assert {key[0] for key in journal.records} == {"answer", "profile", "score"} and result.chosen.loss is not None
    assert MoACalibration(settings).settings["text"] == str(text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lengths": (500,)}, "--lengths: expected multiples of 64 from 512 on, got 500"),
        ({"lengths": (2048,)}, "--lengths: a prompt of 1920 tokens and 128 for the answer do not fit"),
        ({"validate_length": 512}, "--validate-length: 512 is among --lengths"),
        ({"density": 0.1}, "--density: expected a share from 0.250"),
        ({"density": 1.5}, "--density: expected a share from 0.250"),
        ({"max_rules": 4}, None),
        ({"tasks": ("foo",)}, "--tasks: there is no task 'foo'"),
    ],
)
def test_what_cannot_be_searched(changes: dict[str, Any], message: str | None, tokenizer: Any) -> None:
    settings = Settings(**{**vars(SMALL), **changes})
    if message is None:
        assert search(tiny(), tokenizer, settings, Journal(None, {}, None)).chosen, "more rules than heads are no limit"
        return
    with pytest.raises(TaskError, match="^" + message.replace(".", r"\.")):
        search(tiny(), tokenizer, settings, Journal(None, {}, None))


def test_the_command(tmp_path: Path, tokenizer: Any) -> None:
    tiny().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-m", "sparse_patch.cli", "calibrate", "moa", "--model", str(tmp_path / "model")]
    command += ["--lengths", "512,640", "--validate-length", "768", "--samples", "1", "--validate-samples", "1"]
    command += [
        "--out",
        str(tmp_path / "p.json"),
        "--json",
        str(tmp_path / "r.json"),
        "--plot",
        str(tmp_path / "s.png"),
    ]
    result = subprocess.run([*command, "--tasks", "vt"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "<- chosen" in result.stdout and "\r" not in result.stdout, "no progress bar in a pipe"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "p.json", "r.json", "s.png"]
    assert read_head_schedules(tmp_path / "p.json").num_layers == 2
    assert json.loads((tmp_path / "r.json").read_text())["chosen"].startswith("plan")
