"""`sparse-patch eval`: rows compared with plain generation, and runs that are killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sparse_patch.config import load_config
from sparse_patch.errors import ConfigError, TaskError
from sparse_patch.evaluation.results import Record, Row, add_to, as_json, rows, summaries, tables
from sparse_patch.evaluation.scoring import found
from sparse_patch.evaluation.suite import Asked, Evaluation, configurations, evaluate, header, score
from sparse_patch.files.writing import WriteError, write_file
from sparse_patch.integration.patch import is_patched
from sparse_patch.models.loading import load_model
from sparse_patch.workbench.generation import encode
from sparse_patch.workbench.journal import Journal
from sparse_patch.workbench.tasks import TASKS

LENGTH = 600
SPARSE = {"prefill": {"method": "flexprefill", "block_size": 32, "min_budget": 64, "min_length": 256, "gamma": 0.6}}


@pytest.fixture(scope="module")
def loaded(needle_llama_path: Path) -> tuple[PreTrainedModel, Any]:
    return load_model(needle_llama_path)


@pytest.fixture
def evaluation() -> Evaluation:
    configs = {"dense": load_config("dense.yaml"), "sparse": load_config(SPARSE)}
    return Evaluation(configs, [TASKS["niah_multikey_1"], TASKS["vt"]], [LENGTH, 450], samples=2, seed=5)


def without_seconds(rows: list[Row]) -> list[dict[str, Any]]:
    return [{**asdict(row), "prefill_s": 0, "decode_s": 0} for row in rows]


def journal(path: Path | None = None, **changes: Any) -> Journal:
    return Journal(path, {"model": "needle-llama", "seed": 5, **changes}, Record)


def test_rows_are_what_plain_generation_gives(loaded: tuple[PreTrainedModel, Any], evaluation: Evaluation) -> None:
    """The dense row equals greedy generation by a never-patched model, scored again here."""
    model, tokenizer = loaded
    result = evaluate(model, tokenizer, evaluation, journal())
    assert [(row.length, row.task, row.config) for row in result] == [
        (length, task.name, config)
        for length in evaluation.lengths
        for task in evaluation.tasks
        for config in evaluation.configs
    ]
    assert not is_patched(model)
    for row in result[::2]:
        exact, shares = [], []
        for index in range(evaluation.samples):
            sample = TASKS[row.task].sample(tokenizer, row.length, evaluation.seed, index)
            ids = tokenizer(sample.prompt, return_tensors="pt")["input_ids"]
            output = model.generate(ids, max_new_tokens=sample.max_new_tokens, do_sample=False)[0, ids.shape[1] :]
            text = tokenizer.decode(output, skip_special_tokens=True)
            exact.append(text.strip().startswith(sample.answer.strip()))
            shares.append(found(text, sample.outputs) / len(sample.outputs))
        assert row.config == "dense" and row.density == 1.0 and row.fallbacks == {}
        assert row.exact_match == sum(exact) / len(exact)
        assert row.score == pytest.approx(sum(shares) / len(shares))
        assert row.score_ci[0] <= row.score <= row.score_ci[1]
        assert row.attended is not None and row.length < row.attended < row.length + 64
    assert all(0.05 < row.density < 0.95 for row in result[1::2]), "the sparse configuration ran sparsely"


def test_token_accuracy_is_teacher_forced(loaded: tuple[PreTrainedModel, Any], evaluation: Evaluation) -> None:
    """Check against one dense forward over prompt and answer."""
    model, tokenizer = loaded
    task = TASKS["niah_multivalue"]
    row = evaluate(model, tokenizer, replace(evaluation, tasks=[task], lengths=[LENGTH]), journal())[0]
    right = total = 0
    for index in range(evaluation.samples):
        sample = task.sample(tokenizer, LENGTH, evaluation.seed, index)
        prompt = tokenizer(sample.prompt)["input_ids"]
        answer = tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0]
        right += int((logits[len(prompt) - 1 : -1].argmax(-1) == torch.tensor(answer)).sum())
        total += len(answer)
    assert row.token_accuracy == right / total
    assert 0 < right < total, "the model makes mistakes here, so the test can fail"


def test_the_score_of_reciting_is_forced(loaded: tuple[PreTrainedModel, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check against the predictions of one dense forward: a mistake does not change or hide what comes after it."""
    model, tokenizer = loaded
    sample = TASKS["recite"].sample(tokenizer, LENGTH, 3, 0)
    tokens, answer = encode(tokenizer, sample.prompt, sample.answer)
    with torch.no_grad():
        logits = model(torch.tensor([tokens + answer])).logits[0, len(tokens) - 1 : -1]
    text = tokenizer.decode(logits.argmax(-1), skip_special_tokens=True)
    monkeypatch.setattr("sparse_patch.evaluation.suite.continue_greedily", None)  # without free generation
    asked, dense = Asked(sample, tokens, answer), {"dense": load_config("dense.yaml")}
    (record,) = score(model, tokenizer, asked, dense, ["dense"], lambda _: None)
    assert record.text == text and record.found == (found(text, sample.outputs), 5)
    assert 0 < record.found[0] < 5, "the model makes a mistake here, so the test can fail"


def test_a_second_run_gives_the_same_rows(loaded: tuple[PreTrainedModel, Any], evaluation: Evaluation) -> None:
    evaluation = replace(evaluation, samples=1)
    first, second = (evaluate(*loaded, evaluation, journal()) for _ in range(2))
    assert without_seconds(first) == without_seconds(second)


class Killed(BaseException):
    """Stands for a signal; nothing in the package catches it."""


def test_resuming_gives_what_one_run_gives(
    loaded: tuple[PreTrainedModel, Any], evaluation: Evaluation, tmp_path: Path
) -> None:
    path, rng = tmp_path / "r.json.unfinished", random.Random(1)
    whole = evaluate(*loaded, evaluation, journal())
    steps: list[str] = []

    def until_killed(description: str) -> None:
        steps.append(description)
        if rng.random() < 0.25:
            raise Killed

    kills = 0
    while True:
        try:
            resumed = evaluate(*loaded, evaluation, journal(path), until_killed)
            break
        except Killed:
            kills += 1
            if path.exists() and rng.random() < 0.5:  # also in the middle of a line
                text = path.read_text(encoding="utf-8")
                path.write_text(text[: len(text) - rng.randrange(1, 60)], encoding="utf-8")
            assert not is_patched(loaded[0])
    assert kills >= 3
    assert without_seconds(resumed) == without_seconds(whole)
    before = path.read_text()
    again = evaluate(*loaded, evaluation, journal(path), lambda _: pytest.fail("everything was there"))
    assert again == resumed and path.read_text() == before


def test_a_killed_process_leaves_no_result_and_goes_on(needle_llama_path: Path, tmp_path: Path) -> None:
    """Kill the command twice by SIGKILL, then let it finish."""
    file = tmp_path / "r.json"
    unfinished = tmp_path / "r.json.unfinished"
    config = tmp_path / "mine.yaml"
    config.write_text(json.dumps(SPARSE))
    command = [sys.executable, "-m", "sparse_patch.cli", "eval", "--model", str(needle_llama_path), "--config"]
    command += [str(config), "--tasks", "niah_multikey_1", "--lengths", "450", "--samples", "4", "--json"]
    lines = 0
    for _ in range(2):
        process = subprocess.Popen([*command, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while not unfinished.is_file() or len(unfinished.read_text().splitlines()) <= lines + 1:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        lines = len(unfinished.read_text().splitlines())
        assert not file.exists()
    for path in (file, tmp_path / "whole.json"):
        subprocess.run([*command, str(path)], check=True, capture_output=True)
    assert not unfinished.exists()
    resumed, whole = (json.loads(path.read_text()) for path in (file, tmp_path / "whole.json"))
    for data in (resumed, whole):
        for row in data["rows"]:
            assert row.pop("prefill_s") > 0 and row.pop("decode_s") > 0
    assert resumed == whole


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    journal(tmp_path / "j")
    assert not (tmp_path / "j").exists(), "nothing is written before something was measured"
    journal(tmp_path / "j").add(record())
    with pytest.raises(TaskError, match=r"j: is of an unfinished run with seed 5, this one has 6; delete it or write"):
        journal(tmp_path / "j", seed=6)
    (tmp_path / "other").write_text("hello\n")
    with pytest.raises(TaskError, match="other: is no journal of an unfinished run; delete it or write --json"):
        journal(tmp_path / "other")


UNREADABLE = [
    b"\xff\xfe\n", b"[1]\n", b"3\n", b"null\n", b"[" * 100_000 + b"\n", b"[" * 900 + b"]" * 900 + b"\n",
    b"\0\n", b"NaN\n", b'"' + b"x" * 100_000 + b'"\n',
]  # fmt: skip


@pytest.mark.parametrize("data", UNREADABLE, ids=[str(data[:12]) for data in UNREADABLE])
@pytest.mark.parametrize("line", ["header", "record"])
def test_a_journal_that_is_none_is_one_line(data: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / "j\nx"
    journal(path).add(record())
    if line == "record":
        data = path.read_bytes() + data
    path.write_bytes(data)
    with pytest.raises(TaskError) as error:
        journal(path)
    problem = r"j\nx: is no journal of an unfinished run; delete it or write --json elsewhere"
    assert str(error.value) == f"{tmp_path}/{problem}"
    assert path.read_bytes() == data, "left as it was"


def test_a_journal_whose_header_is_long_is_bounded(tmp_path: Path) -> None:
    journal(tmp_path / "j").add(record())
    whole = (tmp_path / "j").read_text()
    (tmp_path / "j").write_text(whole.replace('"seed": 5', f'"seed": "{"x" * 100_000}"', 1))
    with pytest.raises(TaskError, match=r"j: is of an unfinished run with seed 'xxx.*\.\.\., this one has 5") as error:
        journal(tmp_path / "j")
    assert len(str(error.value)) <= 490


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_was_measured_is_kept_when_the_result_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    unwritten = pytest.raises(
        WriteError,
        match="^/dev/full: cannot be written: No space left on device; measurements are kept in "
        rf"{path}.unfinished; run the same command to continue$",
    )
    with unwritten, Journal.beside(path, {"seed": 5}, Record) as kept:
        kept.add(record())
        write_file(Path("/dev/full"), "{}")
    with Journal.beside(path, {"seed": 5}, Record) as again:
        assert list(again.records.values()) == [record()]
        write_file(path, "{}")
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_nothing_is_measured_when_something_cannot_be(loaded: tuple[PreTrainedModel, Any]) -> None:
    configs = configurations([])
    for length, message in (
        (
            32768,
            r"--lengths: vt: a prompt of 32768 tokens and 64 for the answer do not fit the model's "
            r"context of 32768; ask for at most 32704",
        ),
        (100, "niah_single_1: the length is too short"),
    ):
        steps: list[str] = []
        tasks = [TASKS["niah_single_1"], TASKS["niah_multikey_3"]] if length == 100 else [TASKS["vt"]]
        with pytest.raises(TaskError, match=message):
            evaluate(*loaded, Evaluation(configs, tasks, [1024, length], 1), journal(), steps.append)
        assert steps == []
    layers = load_config({"prefill": {"method": "flexprefill", "layers": [9]}})
    with pytest.raises(ConfigError, match="the model has no layer 9"):
        evaluate(*loaded, Evaluation({**configs, "x": layers}, [TASKS["vt"]], [1024], 1), journal())


def test_configurations(tmp_path: Path) -> None:
    assert list(configurations(["flexprefill.yaml", "dense"])) == ["dense", "flexprefill"]
    (tmp_path / "flexprefill.yaml").write_text("prefill: {method: flexprefill}")
    (tmp_path / "dense.yaml").write_text("prefill: {method: flexprefill}")
    for sources in (["flexprefill", str(tmp_path / "flexprefill.yaml")], [str(tmp_path / "dense.yaml")]):
        with pytest.raises(TaskError, match=r"there is another configuration called '\w+'; rename the file"):
            configurations(sources)


def record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        **{"config": "a", "fingerprint": "f", "task": "vt", "length": 9, "index": 0, "found": (1, 2), "right": (3, 4)},
        **{"prefill": (5.0, 10, 4), "decode": (12.0, 12, 3), "prefill_s": 1.0, "decode_s": 2.0, "fallbacks": {}},
        **{"text": "t"},
    }
    return Record(**{**values, **changes})


def test_rows_are_made_of_records() -> None:
    (row,) = rows(
        [
            record(),
            record(index=1, found=(2, 2), right=(4, 4), prefill=(15.0, 30, 4), prefill_s=3.0, fallbacks={"why": 2}),
            record(index=2, found=(2, 2), right=(2, 2), decode=(0.0, 0, 0), prefill_s=5.0, fallbacks={"why": 1}),
        ]
    )
    assert row.samples == 3 and row.score == pytest.approx(5 / 6) and row.exact_match == pytest.approx(2 / 3)
    assert row.token_accuracy == 9 / 10 and row.density == 25 / 50 and row.attended == 24 / 6
    assert row.prefill_s == 3.0 and row.fallbacks == {"why": 3}


def test_add_keeps_the_rows_of_others() -> None:
    about = {"machine": {}, "model": "m", "seed": 0}
    dense, flex = load_config("dense"), load_config("flexprefill")
    old = as_json(rows([record(config="dense"), record(config="b")]), about, {"dense": dense, "b": flex})
    new = as_json(rows([record(config="dense", right=(4, 4)), record(config="c")]), about, {"dense": dense, "c": flex})
    both = add_to(old, new, Path("r.json"))
    assert [(row["config"], row["exact_match"]) for row in both["rows"]] == [("b", 0), ("dense", 1), ("c", 0)]
    assert set(both["configs"]) == {"dense", "b", "c"}
    with pytest.raises(TaskError, match=r"r.json: --add: has seed 0, this run has 1"):
        add_to(old, {**new, "seed": 1}, Path("r.json"))
    with pytest.raises(TaskError, match="'b' was another configuration there"):
        add_to(old, as_json([], about, {"b": dense}), Path("r.json"))


def test_tables_name_everything(evaluation: Evaluation) -> None:
    from rich.console import Console

    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(*tables(rows([record(), record(config="b")]), 9), *summaries(rows([record(fallbacks={"x": 7})])))
    text = capture.get()
    assert "vt" in text and "0.50" in text and "0.750" in text and " 7" in text
    assert header("m", evaluation, None)["haystack"] == "pydoc_data.topics"
    assert header("m", replace(evaluation, haystack="abc"), "f.txt")["haystack_sha256"] == "ba7816bf8f01"
