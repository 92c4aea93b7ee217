"""The suite `damage`: predictions compared with those of dense attention, checked against whole forwards."""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from scipy import stats
from transformers import PreTrainedModel

from sparse_patch import patched
from sparse_patch.config import PatchConfig, load_config
from sparse_patch.evaluation.damage import Damage, damage, predict
from sparse_patch.evaluation.results import Record, Row, as_json, rows, summaries, tables
from sparse_patch.evaluation.suite import Asked, Evaluation, evaluate
from sparse_patch.models.loading import load_model
from sparse_patch.plots import plot_accuracy
from sparse_patch.workbench.journal import Journal
from sparse_patch.workbench.prompts import default_haystack
from sparse_patch.workbench.tasks import TASKS
from sparse_patch.workbench.tasks.continuations import Copy, Prose

LENGTH = 400
TOKENS = 12  # that are compared, for speed
QUEST = {"method": "quest", "page_size": 4, "min_length": 64}
FLEX = {"method": "flexprefill", "block_size": 16, "min_budget": 16, "min_length": 64}


def config(**phases: dict[str, Any]) -> PatchConfig:
    return load_config(dict(phases))


CONFIGS = {
    "dense": load_config("dense.yaml"),
    "decode-all": config(decode={**QUEST, "budget": 4096}),
    "decode-some": config(decode={**QUEST, "budget": 200}),
    "decode-few": config(decode={**QUEST, "budget": 32}),
    "prefill-all": config(prefill={**FLEX, "gamma": 1.0, "min_budget": 4096}),
    "prefill-few": config(prefill={**FLEX, "gamma": 0.1}),
    "both-few": config(prefill={**FLEX, "gamma": 0.1}, decode={**QUEST, "budget": 32}),
}


@pytest.fixture(scope="module", autouse=True)
def _fast() -> Iterator[None]:
    """Compare few tokens, in one thread: for a small model, threads cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for task in (Copy, Prose):
            patch.setattr(task, "compared", TOKENS)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded(needle_llama_path: Path) -> tuple[PreTrainedModel, Any]:
    return load_model(needle_llama_path)


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    text = default_haystack()[:60_000]  # for speed
    return Evaluation(CONFIGS, [TASKS["copy"], TASKS["prose"]], [LENGTH], samples=2, seed=3, haystack=text)


@pytest.fixture(scope="module")
def result(loaded: tuple[PreTrainedModel, Any], evaluation: Evaluation) -> dict[tuple[str, str], Row]:
    return {(row.task, row.config): row for row in evaluate(*loaded, evaluation, journal())}


def journal(path: Path | None = None) -> Journal:
    return Journal(path, {"seed": 3}, Record)


def asked(tokenizer: Any, task: str, index: int = 0) -> Asked:
    return Asked.of(TASKS[task].sample(tokenizer, LENGTH, 3, index), tokenizer)


def without_seconds(found: list[Row]) -> list[dict[str, Any]]:
    return [{**asdict(row), "prefill_s": 0, "decode_s": 0} for row in found]


def whole(model: PreTrainedModel, tokens: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities of the answer's tokens from one forward without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens + answer[:-1]])).logits[0, len(tokens) - 1 :]
    return logits.double().log_softmax(-1)


def slow_damage(dense: torch.Tensor, ours: torch.Tensor, answer: list[int]) -> Damage:
    """Written out token by token."""
    kl = loss = dense_loss = 0.0
    same = 0
    for p, q, token in zip(dense.tolist(), ours.tolist(), answer, strict=True):
        kl += sum(exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        same += p.index(max(p)) == q.index(max(q))
        loss, dense_loss = loss - q[token], dense_loss - p[token]
    number = len(answer)
    return Damage(kl / number, same, loss / number, dense_loss / number)


def close(found: Damage, expected: Damage) -> None:
    assert found.same == expected.same
    assert asdict(found) == pytest.approx(asdict(expected), rel=1e-4, abs=1e-6)


def test_the_figures_of_made_up_predictions() -> None:
    """KL is of dense first: the other way round it would be another number."""
    generator = torch.Generator().manual_seed(0)
    dense, ours = (torch.randn(40, 7, generator=generator).mul(3).log_softmax(-1) for _ in range(2))
    answer = [0, 6, 3, 3, 1] * 8
    found = damage(dense, ours, answer)
    close(found, slow_damage(dense, ours, answer))
    assert abs(found.kl - damage(ours, dense, answer).kl) > 0.01 and 0 < found.same < 40
    assert damage(dense, dense, answer).kl == 0.0


def test_dense_is_a_forward_of_the_unpatched_model(loaded: tuple[PreTrainedModel, Any]) -> None:
    model, tokenizer = loaded
    ask = asked(tokenizer, "copy")
    assert len(ask.tokens) == LENGTH and len(ask.answer) == TOKENS
    expected = whole(model, ask.tokens, ask.answer)
    predicted = predict(model, ask.tokens, ask.answer, CONFIGS["dense"])
    torch.testing.assert_close(predicted.log_probs.double(), expected, atol=1e-4, rtol=0)
    assert predicted.report.pairs("decode")[2] > 0, "dense is fed token by token: its keys read are what others' are"


def test_a_prefill_method_is_compared_within_its_prefill(loaded: tuple[PreTrainedModel, Any]) -> None:
    """The same as a patched forward over prompt and answer, in which the answer's queries are sparse too."""
    model, tokenizer = loaded
    ask = asked(tokenizer, "copy")
    dense = whole(model, ask.tokens, ask.answer)
    with patched(model, CONFIGS["prefill-few"]):
        expected = whole(model, ask.tokens, ask.answer)
    predicted = predict(model, ask.tokens, ask.answer, CONFIGS["prefill-few"])
    assert predicted.decode_s == 0.0 and predicted.report.pairs("decode")[2] == 0
    layers = model.config.num_hidden_layers
    assert predicted.report.pairs("prefill")[2] == layers * (LENGTH + TOKENS - 1)
    torch.testing.assert_close(predicted.log_probs.double(), expected, atol=1e-4, rtol=0)
    close(damage(dense.float(), predicted.log_probs, ask.answer), slow_damage(dense, expected, ask.answer))
    assert damage(dense.float(), predicted.log_probs, ask.answer).kl > 1e-2, "so the test can fail"


@pytest.mark.parametrize("name", ["decode-few", "both-few"])
def test_a_decode_method_is_fed_token_by_token(loaded: tuple[PreTrainedModel, Any], name: str) -> None:
    """The same as a loop written here: prefill, then a forward for each token."""
    model, tokenizer = loaded
    ask = asked(tokenizer, "copy", 1)
    with patched(model, CONFIGS[name]), torch.no_grad():
        output = model(torch.tensor([ask.tokens]))
        logits = [output.logits[0, -1]]
        for token in ask.answer[:-1]:
            output = model(torch.tensor([[token]]), past_key_values=output.past_key_values)
            logits.append(output.logits[0, -1])
    predicted = predict(model, ask.tokens, ask.answer, CONFIGS[name])
    expected = torch.stack(logits).log_softmax(-1)
    torch.testing.assert_close(predicted.log_probs, expected, atol=1e-4, rtol=0)
    assert predicted.report.pairs("decode")[2] == model.config.num_hidden_layers * (TOKENS - 1)
    dense = whole(model, ask.tokens, ask.answer)
    close(damage(dense.float(), predicted.log_probs, ask.answer), slow_damage(dense, expected, ask.answer))


def test_what_reads_everything_does_no_damage(result: dict[tuple[str, str], Row]) -> None:
    for (task, name), row in result.items():
        assert row.task == task and row.score is None and row.exact_match is None and row.score_ci is None
        if name == "dense":
            assert row.kl == row.added_loss == 0.0 and row.agreement == 1.0
        if name.endswith("all"):
            assert row.kl is not None and row.kl < 1e-6, (task, name, row.kl)
            assert row.agreement == 1.0 and row.added_loss == pytest.approx(0, abs=1e-4)


def test_a_smaller_budget_does_more_damage(result: dict[tuple[str, str], Row]) -> None:
    for task in ("copy", "prose"):
        least, some, most = (result[task, f"decode-{name}"].kl or 0.0 for name in ("all", "some", "few"))
        assert least < 1e-6 < 1e-4 < some < most / 2 and most > 0.01, (least, some, most)
        for name in ("decode-few", "prefill-few", "both-few"):
            row, dense = result[task, name], result[task, "dense"]
            assert row.kl is not None and row.kl > 5e-3, (task, name, row.kl)
            assert row.loss is not None and dense.loss is not None and row.added_loss is not None
            assert row.added_loss == pytest.approx(row.loss - dense.loss)
    copied, prose = result["copy", "dense"].loss, result["prose", "dense"].loss
    assert copied is not None and prose is not None and copied < prose / 2, "dense attention copies"


def test_rows_are_means_over_prompts() -> None:
    values = [Damage(0.1, 60, 0.5, 0.4), Damage(0.3, 50, 0.9, 0.5), Damage(0.8, 64, 0.2, 0.3)]
    (row,) = rows(record(index=index, damage=value) for index, value in enumerate(values))
    assert (row.kl, row.loss, row.added_loss) == pytest.approx((0.4, 1.6 / 3, 0.4 / 3))
    assert row.agreement == 174 / 192 and row.agreement_ci is not None and row.agreement_ci[0] < 174 / 192
    for name, figures in (("loss", [0.5, 0.9, 0.2]), ("added_loss", [0.1, 0.4, -0.1])):
        ends = stats.ttest_1samp(figures, 0).confidence_interval()
        expected = [max(0, ends.low) if name == "loss" else ends.low, ends.high]
        assert getattr(row, f"{name}_ci") == pytest.approx(expected)
    assert row.kl_ci is not None and row.kl_ci[0] == 0.0 and row.kl_ci[1] == pytest.approx(1.2956, abs=1e-3)
    (one,) = rows([record(damage=values[0])])
    assert one.kl == 0.1 and one.kl_ci is one.loss_ci is one.added_loss_ci is None
    json.dumps(as_json([row, one], {}, {}))


def record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        **{"config": "a", "fingerprint": "f", "task": "copy", "length": 9, "index": 0, "right": (40, 64)},
        **{"prefill": (5.0, 10, 4), "decode": (12.0, 12, 3), "prefill_s": 1.0, "decode_s": 2.0, "fallbacks": {}},
        **{"text": "t"},
    }
    return Record(**{**values, **changes})


class Killed(BaseException):
    """Stands for a signal; nothing in the package catches it."""


def test_resuming_gives_what_one_run_gives(
    loaded: tuple[PreTrainedModel, Any], evaluation: Evaluation, tmp_path: Path
) -> None:
    """Also if dense has its record already: it runs again for its predictions, and no record comes twice."""
    names = ("dense", "decode-few", "prefill-few")
    evaluation = replace(evaluation, configs={name: CONFIGS[name] for name in names}, lengths=[300])
    first, uninterrupted = (evaluate(*loaded, evaluation, journal()) for _ in range(2))
    assert without_seconds(first) == without_seconds(uninterrupted), "the same command twice"
    path, rng, kills, after_dense = tmp_path / "j", random.Random(2), 0, 0

    def until_killed(description: str) -> None:
        nonlocal after_dense
        if rng.random() < 0.4:
            after_dense += not description.endswith("dense")
            raise Killed

    while True:
        try:
            resumed = evaluate(*loaded, evaluation, journal(path), until_killed)
            break
        except Killed:
            kills += 1
    assert kills >= 3 and after_dense >= 2
    assert without_seconds(resumed) == without_seconds(uninterrupted)
    lines = path.read_text().splitlines()[1:]
    assert len(lines) == 2 * 2 * len(names) == len({tuple(journal(path).records)[n] for n in range(len(lines))})


def test_tables_and_pictures_of_both_kinds(tmp_path: Path) -> None:
    both = rows([record(damage=Damage(0.00012, 60, 0.5, 0.4)), record(task="vt", found=(1, 2))])
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(*tables(both, 9), *summaries(both))
    scores, compared, *means = capture.get().split("9 tokens")[1:]
    assert "score" in scores and "vt" in scores and "KL" not in scores and "copy" not in scores
    assert "KL" in compared and "0.00012" in compared and "copy" in compared and "vt" not in compared and not means
    assert "mean over tasks, compared with dense" in compared
    about = {"a": load_config("flexprefill.yaml")}
    for chosen in (both, both[:1]):
        plot_accuracy(as_json(chosen, {}, about), tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
