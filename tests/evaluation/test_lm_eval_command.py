"""lm-eval's command line with `hf-sparse`, and its refusals."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import lm_eval
import pytest
from builders.lm_eval_tasks import SPARSE, offline_tasks, own_tasks
from commands import run
from lm_eval.tasks import TaskManager

from sparse_patch import SparsePatchError, TaskError
from sparse_patch.evaluation.lm_eval import SparseLM, main
from sparse_patch.evaluation.lm_eval.command import _results_in
from sparse_patch.files.writing import WriteError


def test_a_task_of_the_users_own_runs_offline_from_the_command_line(path: str, tmp_path: Path) -> None:
    folder, config = own_tasks(tmp_path), "flexprefill.yaml"
    command = [sys.executable, "-m", "sparse_patch.cli", "lm-eval", "--model", "hf-sparse", "--model_args"]
    command += [f"pretrained={path},config={config},dtype=float32", "--tasks", "own_choice,own_generate"]
    command += ["--include_path", str(folder), "--output_path", str(tmp_path / "out"), "--batch_size", "2"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    about = json.loads(file.read_text())["config"]["sparse_patch"]
    assert about["source"] == config and len(about["config_hash"]) == 12
    assert about["density"] == 1.0 and about["attended"] > 1 and about["fallbacks"] == {}
    assert set(about["versions"]) == {"sparse_patch", "torch", "transformers"}
    assert "own_choice" in result.stdout


TASK = ["--tasks", "needle_vt", "--metadata"]
BAD_ARGUMENTS = [
    (
        ["--tasks"],
        "lm-eval: argument --tasks/-t: expected at least one argument; see `sparse-patch lm-eval run --help`",
    ),
    (["--limit", "x"], "lm-eval: argument --limit/-L: invalid float value: 'x'; see `sparse-patch lm-eval run --help`"),
    (["--bogus"], "lm-eval: unrecognized arguments: --bogus; see "),
    ([*TASK, '{"max_seq_lengths": "x"}'], "needle_vt: metadata: max_seq_lengths: expected 1 or more, got ['x']"),
    (
        [*TASK, '{"max_seq_lengths": [512, 0]}'],
        "needle_vt: metadata: max_seq_lengths: expected 1 or more, got [512, 0]",
    ),
    ([*TASK, '{"max_seq_lengths": []}'], "needle_vt: metadata: max_seq_lengths: expected 1 or more, got []"),
    ([*TASK, '{"num_samples": -1}'], "needle_vt: metadata: num_samples: expected 1 or more, got [-1]"),
    ([*TASK, '{"num_samples": true}'], "needle_vt: metadata: num_samples: expected 1 or more, got [True]"),
]


@pytest.mark.parametrize("arguments, message", BAD_ARGUMENTS, ids=[row[1][9:40] for row in BAD_ARGUMENTS])
def test_arguments_that_lm_eval_does_not_take(
    path: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # they take long
    with pytest.raises(TaskError) as error:
        main(["--model", "hf-sparse", "--model_args", f"pretrained={path},config=dense", *arguments])
    assert str(error.value).startswith(message) and "usage:" not in capsys.readouterr().err


BAD = [
    (["--tasks", "no_such_task"], "error: lm-eval: "),
    (
        ["--tasks", "needle_vt", "--include_path", "no/such/folder"],
        "error: --include_path: no/such/folder: is not a folder",
    ),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=["task", "include_path"])
def test_bad_arguments_are_one_line(path: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    command = ["lm-eval", "--model", "hf-sparse", "--model_args", f"pretrained={path},config=dense.yaml", *arguments]
    result = run(*command, "--output_path", str(tmp_path / "out"), cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(message), result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.rglob("results_*.json"))


def test_results_that_cannot_be_written(path: str, tmp_path: Path) -> None:
    """The error comes before the run if possible; lm-eval itself only logs that writing failed."""
    (tmp_path / "file").write_text("no folder")
    arguments = ["--model", "hf-sparse", "--model_args", f"pretrained={path},config=dense", "--tasks", "needle_vt"]
    for output in (tmp_path / "file", tmp_path / "file" / "deep" / "r.json"):
        with pytest.raises(WriteError, match=rf"^--output_path: {output}: cannot be written: .* is not a folder$"):
            main([*arguments, "--output_path", str(output)])
    unwritten = pytest.raises(WriteError, match="out: no results could be written; the table above")
    with unwritten, _results_in(str(tmp_path / "out")):
        pass
    with _results_in(str(tmp_path / "out")):
        (tmp_path / "out" / "model").mkdir(parents=True)
        (tmp_path / "out" / "model" / "results_1.json").touch()


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    for name, message in (("no-such-model", "no such folder"), (str(tmp_path), "has no config.json")):
        with pytest.raises(SparsePatchError, match=rf"^hf-sparse: pretrained: {name}: cannot be loaded: {message}"):
            SparseLM(name, "dense.yaml")


def test_prompts_that_cannot_be_made_or_read(path: str) -> None:
    with pytest.raises(TaskError, match="vt: the length is too short for what is hidden"):
        offline_tasks(path, max_seq_lengths=100).load(["needle_vt"])
    with pytest.raises(SparsePatchError, match="tokenizer: no-such-model: cannot be loaded"):
        offline_tasks("no-such-model").load(["needle_vt"])
    with pytest.raises(TaskError, match=r"hf-sparse: needle_vt: 32760 tokens do not fit, the model's context of 32768"):
        lm_eval.simple_evaluate(
            model=SparseLM(path, "dense.yaml"),
            tasks=["needle_vt"],
            task_manager=offline_tasks(path, max_seq_lengths=32760, num_samples=1),
        )


def test_data_parallel_under_accelerate(path: str, tmp_path: Path) -> None:
    """Two processes share the prompts; scores and counts are those of one."""
    outputs = []
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    config = tmp_path / "sparse.yaml"
    config.write_text(json.dumps(SPARSE))
    for number, prefix in enumerate(([sys.executable], launch)):
        folder = tmp_path / str(number)
        command = [
            *prefix,
            "-m",
            "sparse_patch.cli",
            "lm-eval",
            "--model",
            "hf-sparse",
            "--tasks",
            "needle_vt",
        ]
        command += ["--model_args", f"pretrained={path},config={config},dtype=float32", "--output_path", str(folder)]
        command += ["--metadata", '{"max_seq_lengths": [640], "num_samples": 3}']
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr[-3000:]
        (file,) = folder.rglob("results_*.json")
        outputs.append(json.loads(file.read_text()))
    one, two = outputs
    assert one["results"]["needle_vt"]["score,none"] == two["results"]["needle_vt"]["score,none"]
    about = [output["config"]["sparse_patch"] for output in outputs]
    # lm-eval gives both ranks the same number of requests, so one of the three runs twice.
    assert about[0]["density"] == pytest.approx(about[1]["density"], abs=0.03)
    assert about[1]["fallbacks"] == {} and about[1]["attended"] == pytest.approx(about[0]["attended"], rel=0.02)
