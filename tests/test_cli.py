"""The command line as a user has it: its own process, exit codes, one-line errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparse_patch.cli", *arguments], capture_output=True, text=True, cwd=cwd, timeout=300
    )


def test_demo_on_the_shipped_model(tmp_path: Path) -> None:
    """A short prompt with a low min_length: the whole way of the main job, at a size for tests."""
    config = tmp_path / "small.yaml"
    config.write_text("prefill: {method: flexprefill, block_size: 32, min_budget: 128, min_length: 512}")
    result = run(
        *("demo", "--length", "2048", "--config", str(config), "--repeats", "1", "--needles", "4"),
        *("--json", str(tmp_path / "d.json"), "--plot", str(tmp_path / "d.png")),
    )
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "d.json").read_text())
    assert data["length"] == 2048 and data["fallbacks"] == {}
    assert data["dense"]["exact_match"] == 1.0 and data["sparse"]["exact_match"] >= 0.75
    assert 0 < data["sparse"]["density"] < 0.9
    assert data["speedup"] == pytest.approx(data["dense"]["prefill_s"] / data["sparse"]["prefill_s"])
    assert [row["dense"] == row["expected"] for row in data["questions"]] == [True] * 4
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    assert "speed-up" in result.stdout and "\r" not in result.stdout, "no progress bar in a pipe"


def test_methods(tmp_path: Path) -> None:
    result = run("methods", "--json", str(tmp_path / "m.json"))
    assert result.returncode == 0 and "flexprefill" in result.stdout
    rows = {row["method"]: row for row in json.loads((tmp_path / "m.json").read_text())}
    assert rows["flexprefill"]["config"] == "flexprefill.yaml" and rows["flexprefill"]["fields"]["gamma"] == 0.95


def test_show_resolves_a_config_against_a_model(tmp_path: Path, needle_llama_path: Path) -> None:
    result = run("show", "flexprefill", "--model", str(needle_llama_path), "--json", str(tmp_path / "s.json"))
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "s.json").read_text())
    assert data["config"]["prefill"]["gamma"] == 0.95
    assert [layer["prefill"] for layer in data["layers"]] == ["flexprefill"] * 8
    assert data["layers"][0] | {"prefill": ""} == {
        **{"layer": 0, "attention": "full", "query_heads": 8, "kv_heads": 2, "head_dim": 64, "decode": "dense"},
        "prefill": "",
    }


BAD = [
    (["show", "nope.yaml"], "error: nope.yaml: no such file"),
    (["show", "bad.yaml"], "error: bad.yaml: prefill.gama: unknown key, did you mean 'gamma'?"),
    (["show", "gamma.yaml"], "error: gamma.yaml: prefill.gamma: expected less than or equal to 1, got float 1.7"),
    (["show", "list.yaml"], "error: list.yaml: expected a mapping"),
    (["show", "dense", "--model", "no-such-model"], "error: --model: no-such-model: cannot be loaded"),
    (["demo", "--model", "no-such-model"], "error: --model: no-such-model: cannot be loaded"),
    (["demo", "--length", "40000"], "error: --length: 40000 tokens and the answer do not fit"),
    (["demo", "--length", "1024", "--needles", "40"], "error: --length: length 1024 is too short for 40 needles"),
    (["demo", "--config", "bad.yaml"], "error: bad.yaml: prefill.gama: unknown key"),
    (["demo", "--json", "no/such/folder/a.json"], "error: no/such/folder/a.json: cannot be written"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[" ".join(row[0]) for row in BAD])
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("prefill: {method: flexprefill, gama: 0.9}")
    (tmp_path / "gamma.yaml").write_text("prefill: {method: flexprefill, gamma: 1.7}")
    (tmp_path / "list.yaml").write_text("- prefill")
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(message) and len(result.stderr.splitlines()) == 1, result.stderr


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    result = run("show", "nope.yaml", "--debug", cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" in result.stderr and "ConfigError" in result.stderr


def test_usage_errors_exit_2() -> None:
    assert run("demo", "--length", "many").returncode == 2
    assert run("no-such-command").returncode == 2
