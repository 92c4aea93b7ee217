"""The command line: files, exit codes and one-line errors, in a separate process if that makes a difference."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import Completed, run

from sparse_patch.cli import app, main


def run_as_user(*arguments: str) -> Completed:
    """Run a command in a separate process."""
    command = [sys.executable, "-m", "sparse_patch.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_demo_on_the_shipped_model(tmp_path: Path) -> None:
    """Run the whole demo at a test size: a short prompt with a low min_length."""
    config = tmp_path / "small.yaml"
    config.write_text("prefill: {method: flexprefill, block_size: 32, min_budget: 256, min_length: 512, gamma: 0.98}")
    result = run_as_user(
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
    result = run_as_user("methods", "--json", str(tmp_path / "m.json"))
    assert result.returncode == 0 and "flexprefill" in result.stdout
    rows = {row["method"]: row for row in json.loads((tmp_path / "m.json").read_text())}
    assert rows["flexprefill"]["config"] == "flexprefill.yaml" and rows["flexprefill"]["fields"]["gamma"] == 0.8


def test_show_resolves_a_config_against_a_model(tmp_path: Path, needle_llama_path: Path) -> None:
    result = run("show", "flexprefill", "--model", str(needle_llama_path), "--json", str(tmp_path / "s.json"))
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "s.json").read_text())
    assert data["config"]["prefill"]["gamma"] == 0.8
    assert [layer["prefill"] for layer in data["layers"]] == ["flexprefill"] * 8
    assert data["layers"][0] | {"prefill": ""} == {
        **{
            "layer": 0,
            "attention": "full",
            "query_heads": 8,
            "kv_heads": 2,
            "head_dim": 64,
            "decode": "dense",
            "role": "",
        },
        "prefill": "",
    }


def test_show_names_the_role_of_every_layer(tmp_path: Path, needle_llama_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("decode: {method: delta, roles: {full: [0, 1, 2, 5]}}")
    command = "show", str(tmp_path / "my.yaml"), "--model", str(needle_llama_path), "--json", str(tmp_path / "s.json")
    result = run(*command)
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "s.json").read_text())
    assert [layer["decode"] for layer in data["layers"]] == ["delta"] * 8
    roles = ["full", "full", "select", "sparse", "sparse", "select", "sparse", "sparse"]
    assert [layer["role"] for layer in data["layers"]] == roles
    result = run("show", "delta", "--model", str(needle_llama_path))
    assert result.returncode == 2 and 'run "sparse-patch calibrate layers' in result.stderr
    assert result.stderr.count("\n") == 1


def test_eval_writes_rows_for_dense_and_every_config(tmp_path: Path, needle_llama_path: Path) -> None:
    """Run what a user runs, at a test size: table, JSON and picture, then more rows added to the JSON."""
    (tmp_path / "mine.yaml").write_text(SMALL)
    command = ["eval", "--model", str(needle_llama_path), "--tasks", "niah_multikey_1,vt", "--lengths", "640,700"]
    command += ["--samples", "2", "--seed", "3", "--json", str(tmp_path / "r.json")]
    result = run(*command, "--config", str(tmp_path / "mine.yaml"), "--plot", str(tmp_path / "r.png"))
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "r.json").read_text())
    assert [(row["config"], row["task"], row["length"]) for row in data["rows"]] == [
        (config, task, length)
        for length in (640, 700)
        for task in ("niah_multikey_1", "vt")
        for config in ("dense", "mine")
    ]
    row = data["rows"][1]
    assert set(row) >= {
        "samples",
        "score",
        "exact_match",
        "token_accuracy",
        "density",
        "attended",
        "prefill_s",
        "decode_s",
    }
    assert row["samples"] == 2 and 0 < row["density"] < 1 and row["fallbacks"] == {} and row["prefill_s"] > 0
    assert data["machine"]["torch"] and data["configs"]["mine"]["prefill"]["block_size"] == 32
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "mean over tasks" in result.stdout and "\r" not in result.stdout, "no progress bar in a pipe"
    assert not list(tmp_path.glob("*.unfinished")) and not list(tmp_path.glob("*.tmp"))
    added = run(*command[:6], "640", *command[7:], "--config", "flexprefill", "--add")
    assert added.returncode == 0, added.stderr
    data = json.loads((tmp_path / "r.json").read_text())
    assert {row["config"] for row in data["rows"]} == {"dense", "mine", "flexprefill"} == set(data["configs"])
    assert len(data["rows"]) == 8 + 2


def test_bench_model_times_what_a_user_types_and_adds_to_a_file(tmp_path: Path, needle_llama_path: Path) -> None:
    command = ["bench", "model", "--lengths", "96", "--new-tokens", "3", "--json", str(tmp_path / "g.json")]
    mine = [*command, "--model", str(needle_llama_path), "--config", "quest.yaml"]
    result = run(*mine, "--cache", "default,static", "--dense", "unpatched")
    assert result.returncode == 0 and "x unpatched" in result.stdout, result.stderr
    added = run(*mine, "--batch", "2", "--dense", "", "--add")
    assert added.returncode == 0 and "x unpatched" in added.stdout, added.stderr
    data = json.loads((tmp_path / "g.json").read_text())
    assert [(row["label"], row["mode"], row["batch"], row["length"]) for row in data["rows"]] == [
        *[("unpatched", "default", 1, 96), ("quest", "default", 1, 96)],
        *[("unpatched", "static", 1, 96), ("quest", "static", 1, 96), ("quest", "default", 2, 96)],
    ]
    assert data["weights"] == needle_llama_path.name and data["configs"]["quest"]["decode"]["method"] == "quest"
    other = run(*command, "--shape", "needle-llama", "--layers", "1", "--config", "quest.yaml", "--add")
    assert other.returncode == 2 and "--add: has weights 'needle-llama', this run has 'random'" in other.stderr
    assert json.loads((tmp_path / "g.json").read_text()) == data


def test_bench_prefill_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(SMALL)
    result = run(
        *("bench", "prefill", "--lengths", "256,640", "--shape", "2,1,16", "--densities", "0.5"),
        *(
            "--config",
            str(tmp_path / "mine.yaml"),
            "--json",
            str(tmp_path / "p.json"),
            "--plot",
            str(tmp_path / "p.png"),
        ),
    )
    assert result.returncode == 0, result.stderr
    data = json.loads((tmp_path / "p.json").read_text())
    assert [row["length"] for row in data["rows"] if row["config"] == "mine"] == [640]
    assert data["skipped"] == {"mine: dense, shorter than min_length 512": [256]}
    assert "needle-llama" in data["qkv"] and set(data["break_even"]["mine"]) >= {"fastest_dense"}
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "x fastest dense" in result.stdout and "mine is faster than" in result.stdout
    assert "\r" not in result.stdout, "no progress bar in a pipe"


def test_tasks_and_export(tmp_path: Path, needle_llama_path: Path) -> None:
    assert "niah_multikey_3" in run("tasks", "--json", str(tmp_path / "t.json")).stdout
    assert {"task": "recite", "asked": "every number in a text, in order", "suites": ["needle", "all"]} in json.loads(
        (tmp_path / "t.json").read_text()
    )
    arguments = ["--tokenizer", str(needle_llama_path), "--tasks", "vt", "--lengths", "600", "--samples", "2"]
    result = run("export", str(tmp_path / "vt.jsonl"), *arguments)
    assert result.returncode == 0 and "2 prompts" in result.stdout
    assert [json.loads(line)["length"] for line in (tmp_path / "vt.jsonl").read_text().splitlines()] == [600, 600]


def test_run_prints_and_runs_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("summary: s\nneeds: n\ncommands:\n- show dense\n- methods --json '{here}/m.json'")
    dry = run("run", str(tmp_path / "r.yaml"), "--dry-run")
    assert dry.stdout.splitlines() == ["sparse-patch show dense", f"sparse-patch methods --json {tmp_path}/m.json"]
    assert not (tmp_path / "m.json").exists()
    assert run("run", str(tmp_path / "r.yaml")).returncode == 0 and (tmp_path / "m.json").exists()


def test_calibrate_minference_writes_what_a_config_reads(tmp_path: Path, needle_llama_path: Path) -> None:
    command = ["calibrate", "minference", "--model", str(needle_llama_path), "--length", "1024"]
    result = run(*command, "--out", str(tmp_path / "p.json"))
    assert result.returncode == 0, result.stderr
    assert "vertical_and_slash" in result.stdout and "\r" not in result.stdout, "no progress bar in a pipe"
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    (tmp_path / "my.yaml").write_text("prefill: {method: minference, calibration: p.json}")
    shown = run("show", str(tmp_path / "my.yaml"), "--model", str(needle_llama_path))
    assert shown.returncode == 0, shown.stderr
    (tmp_path / "p.json").write_text("[{}]")
    shown = run("show", str(tmp_path / "my.yaml"), "--model", str(needle_llama_path))
    assert shown.returncode == 2 and 'num_layers 1, this one has 8; run "sparse-patch calibrate minf' in shown.stderr


def test_lm_eval_gets_its_own_arguments() -> None:
    assert "--model_args" in run("lm-eval", "run", "--help").stdout
    refused = run("lm-eval", "run", "--num_fewshot", "few", "--help")
    assert refused.returncode == 2 and refused.stderr.startswith("error: lm-eval: ")


def _commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words of every command and of every command group."""
    inner = getattr(group, "commands", {})
    return [path, *(words for name, one in inner.items() for words in _commands(one, (*path, name)))]


HELP = """
import json, sys
from sparse_patch.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["sparse-patch", *words, "--help"]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, words
    heavy = {"torch", "transformers", "triton", "numpy", "sparse_patch.config"} & set(sys.modules)
    assert not heavy, f"{words}: --help imports {heavy}"
"""


def test_help_of_every_command_comes_without_torch() -> None:
    """Help appears at once, because a command imports what it needs only when it runs."""
    commands = _commands(typer.main.get_command(app))
    assert {(), ("eval",), ("lm-eval",), ("bench", "prefill"), ("calibrate", "moa")} <= set(commands)
    command = [sys.executable, "-c", HELP, json.dumps([*commands, ("lm-eval", "run")])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Usage: sparse-patch") >= len(commands) - 1 and "--model_args" in result.stdout


SMALL = "prefill: {method: flexprefill, block_size: 32, min_budget: 128, min_length: 512}"
LITTLE = ["--tasks", "vt", "--lengths", "1024", "--samples", "1", "--json", "r.json"]
DECODE = ["bench", "decode", "--json", "p.json"]
MODEL = ["bench", "model", "--json", "p.json"]


def test_calibrate_sale_writes_what_a_config_reads(tmp_path: Path, needle_llama_path: Path) -> None:
    command = ["calibrate", "sale", "--model", str(needle_llama_path), "--lengths", "512", "--samples", "1"]
    result = run(*command, "--tasks", "niah_single_1", "--out", "t.safetensors", cwd=tmp_path)
    assert result.returncode == 0 and "prefill.calibration: t.safetensors" in result.stdout, result.stderr
    config = tmp_path / "sale.yaml"
    config.write_text("prefill: {method: sale, calibration: t.safetensors}")
    assert run("show", str(config), "--model", str(needle_llama_path)).returncode == 0
    config.write_text("prefill: {method: sale, calibration: t.safetensors, window: 256}")
    shown = run("show", str(config))
    assert shown.returncode == 2 and "was made with window 128, the configuration has 256" in shown.stderr


LAYERS = ["calibrate", "layers", "--out", "l.yaml"]
BENCH = ["bench", "prefill", "--json", "p.json"]

BAD = [
    (["eval", "--config", "nope.yaml"], "error: nope.yaml: no such file"),
    (["eval", "--config", "bad.yaml", *LITTLE], "error: bad.yaml: prefill.gama: unknown key"),
    (["eval", "--config", "layers.yaml", *LITTLE], "error: layers.yaml: prefill.layers: the model has no layer 9"),
    (["eval", "--suite", "nedle"], "error: --suite: expected one of needle"),
    (["eval", "--tasks", "vt,niah"], "error: --tasks: there is no task 'niah'"),
    (["eval", "--lengths", "4k"], "error: --lengths: expected numbers of tokens"),
    (
        ["eval", "--tasks", "vt", "--lengths", "40000", "--json", "r.json"],
        "error: --lengths: vt: a prompt of 40000 tokens",
    ),
    (["eval", *LITTLE, "--haystack", "nope.txt"], "error: --haystack: nope.txt: cannot be read"),
    (["eval", "--tasks", "recite", "--lengths", "2048", "--haystack", "short.txt"], "error: recite: the haystack has"),
    (["eval", "--model", "no-such-model", *LITTLE], "error: --model: no-such-model: cannot be loaded"),
    (["eval", "--add"], "error: --add: needs --json FILE"),
    (["eval", "--add", "--json", "bad.yaml"], "error: bad.yaml: --add: is no result of"),
    (["eval", "--json", "no/such/r.json"], "error: no/such/r.json: cannot be written"),
    (["export", "x.jsonl", "--tokenizer", "no-such"], "error: --tokenizer: no-such: cannot be loaded"),
    (["export", "x.jsonl", "--lengths", "2048", "--haystack", "short.txt"], "error: niah_single_2: the haystack has"),
    ([*BENCH, "--shape", "llama"], "error: --shape: expected llama-3.1-8b"),
    ([*BENCH, "--shape", "6,4,64"], "error: --shape: expected llama-3.1-8b"),
    ([*BENCH, "--shape", f"{10**40},1,64"], "error: --shape: expected llama-3.1-8b"),
    ([*BENCH, "--lengths", f"{10**40}"], "error: --lengths: expected numbers of tokens with commas between"),
    ([*BENCH, "--lengths", "9" * 5000], "error: --lengths: expected numbers of tokens with commas between"),
    ([*BENCH, "--shape", "1048575,1,1048575", "--lengths", f"{2**31 - 1}"], "error: out of memory; ask for less: "),
    ([*DECODE, "--batch", f"{10**40}"], "error: Invalid value for '--batch': "),
    ([*BENCH, "--densities", "0,0.5"], "error: --densities: expected shares above 0"),
    ([*BENCH, "--densities", "1.5"], "error: --densities: expected shares above 0"),
    ([*BENCH, "--densities", "few"], "error: --densities: expected shares above 0"),
    ([*BENCH, "--lengths", "0"], "error: --lengths: expected numbers of tokens"),
    ([*BENCH, "--lengths", "-5"], "error: --lengths: expected numbers of tokens"),
    ([*BENCH, "--dtype", "int8"], "error: --dtype: expected bfloat16, float16, float32, got 'int8'"),
    ([*BENCH, "--config", "dense"], "error: --config: dense: has no sparse prefill method to time"),
    ([*BENCH, "--config", "decode.yaml"], "error: --config: decode.yaml: has no sparse prefill method"),
    ([*BENCH, "--config", "bad.yaml"], "error: bad.yaml: prefill.gama: unknown key"),
    ([*BENCH, "--config", "flexprefill", "--lengths", "9"], "error: niah_multikey_2: "),
    ([*BENCH, "--qkv", "nope.safetensors"], "error: --qkv: nope.safetensors: cannot be read"),
    ([*BENCH, "--qkv", "short.txt"], "error: --qkv: short.txt: cannot be read"),
    ([*BENCH[:2], "--json", "no/such/p.json"], "error: no/such/p.json: cannot be written"),
    ([*BENCH[:2], "--json", "."], "error: .: cannot be written: it is a folder"),
    (
        [*DECODE, "--shape", "gemma3-12b"],
        "error: --shape: expected llama-3.1-8b, qwen2.5-7b, qwen3-8b, needle-llama, got",
    ),
    ([*DECODE, "--lengths", "32k"], "error: --lengths: expected numbers of tokens"),
    ([*DECODE, "--budgets", "0"], "error: --budgets: expected numbers of tokens"),
    ([*DECODE, "--dtype", "int8"], "error: --dtype: expected bfloat16, float16, float32, got 'int8'"),
    ([*DECODE, "--config", "flexprefill"], "error: --config: flexprefill: has no sparse decode method to time"),
    ([*DECODE, "--config", "delta3.yaml"], "error: delta3.yaml: decode.roles: no published choice for this model"),
    ([*DECODE, "--config", "bad.yaml"], "error: bad.yaml: prefill.gama: unknown key"),
    ([*DECODE[:2], "--json", "no/such/p.json"], "error: no/such/p.json: cannot be written"),
    ([*MODEL, "--shape", "llama-3.1-8"], "error: --shape: expected llama-3.1-8b"),
    (
        [*MODEL, "--cache", "paged"],
        "error: --cache: expected some of default, static, with commas between, got 'paged'",
    ),
    ([*MODEL, "--cache", ","], "error: --cache: expected some of default, static, with commas between, got ','"),
    ([*MODEL, "--decode-graph", "on"], "error: --decode-graph: expected some of auto, off, with commas between, got"),
    ([*MODEL, "--cache", "static", "--decode-graph", "off"], "error: --decode-graph: off has no effect on a static"),
    ([*MODEL, "--dense", "copying"], "error: --dense: expected some of unpatched, best, with commas between, got"),
    ([*MODEL, "--model", "no-such-model"], "error: --model: no-such-model: cannot be loaded"),
    (
        [*MODEL, "--model", ".", "--shape", "qwen3-8b"],
        "error: --shape: qwen3-8b is for random weights, --model has its",
    ),
    ([*MODEL, "--model", ".", "--layers", "2"], "error: --layers: 2 is for random weights, --model has its own; leave"),
    ([*MODEL[:2], "--add"], "error: --add: needs --json FILE, whose rows are kept"),
    (
        [*MODEL[:2], "--add", "--json", "bad.yaml"],
        "error: bad.yaml: --add: is no result of `sparse-patch bench model`; name another file",
    ),
    ([*MODEL, "--lengths", "-1"], "error: --lengths: expected numbers of tokens"),
    ([*MODEL, "--config", "dense"], "error: --config: dense: has no sparse method to time"),
    ([*MODEL, "--config", "delta3.yaml"], "error: delta3.yaml: decode.roles: no published choice for this model"),
    ([*MODEL[:2], "--json", "."], "error: .: cannot be written: it is a folder"),
    ([*MODEL[:2], "--add", "--json", "rows.json"], "error: rows.json: --add: is no result of `sparse-patch bench"),
    (["run", "nope.yaml"], "error: nope.yaml: cannot be read"),
    (["show", "nope.yaml"], "error: nope.yaml: no such file"),
    (["show", "bad.yaml"], "error: bad.yaml: prefill.gama: unknown key, did you mean 'gamma'?"),
    (["show", "gamma.yaml"], "error: gamma.yaml: prefill.gamma: expected less than or equal to 1, got float 1.7"),
    (["show", "list.yaml"], "error: list.yaml: expected a mapping"),
    (["show", "dense", "--model", "no-such-model"], "error: --model: no-such-model: cannot be loaded"),
    (["demo", "--model", "no-such-model"], "error: --model: no-such-model: cannot be loaded"),
    (["demo", "--length", "40000"], "error: --length: a prompt of 40000 tokens and 12 for the answer do not fit"),
    (["demo", "--length", "1024", "--needles", "40"], "error: --length: "),
    (["demo", "--config", "bad.yaml"], "error: bad.yaml: prefill.gama: unknown key"),
    (["calibrate", "minference", "--out", "no/such/p.json"], "error: no/such/p.json: cannot be written"),
    (["calibrate", "minference", "--out", "p.json", "--model", "no-such"], "error: --model: no-such: cannot be loaded"),
    (
        ["calibrate", "minference", "--out", "p.json", "--length", "40000"],
        "error: --length: a prompt of 40000 tokens and 0 for the answer do not fit",
    ),
    (
        ["calibrate", "sale", "--out", "t", "--numerics", "int5"],
        "error: dict: prefill.numerics: expected 'int4' or 'int8'",
    ),
    (["calibrate", "sale", "--out", "t", "--tasks", "foo"], "error: --tasks: there is no task 'foo'"),
    (["calibrate", "sale", "--out", "t", "--text", "none.txt"], "error: --text: none.txt: cannot be read"),
    (["calibrate", "moa", "--out", "no/such/p.json"], "error: no/such/p.json: cannot be written"),
    (
        ["calibrate", "moa", "--out", "p.json", "--lengths", "1000"],
        "error: --lengths: expected multiples of 64 from 512",
    ),
    (["calibrate", "moa", "--out", "p.json", "--density", "0.1"], "error: --density: expected a share from 0.1"),
    (["calibrate", "layers", "--out", "no/such/l.yaml"], "error: no/such/l.yaml: cannot be written"),
    (["calibrate", "layers", "--out", "l.yaml", "--json", "."], "error: .: cannot be written: it is a folder"),
    (["calibrate", "layers", "--out", "l.yaml", "--model", "no-such"], "error: --model: no-such: cannot be loaded"),
    ([*LAYERS, "--select", "5"], "error: --select: the model has 4 layers to choose from, not 5"),
    ([*LAYERS, "--length", "40000", "--samples", "1"], "error: --length: a prompt of 40000 tokens and "),
    ([*LAYERS, "--length", "1024", "--budget", "1024"], "error: --budget: 1024 tokens are all of a prompt of 1024"),
    (["show", "calibration.yaml"], "error: calibration.yaml: prefill.calibration: no.json: cannot be read"),
    (["demo", "--json", "no/such/folder/a.json"], "error: no/such/folder/a.json: cannot be written"),
]


@pytest.mark.parametrize("arguments, message", BAD, ids=[" ".join(row[0]) for row in BAD])
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Runs in this process, because importing torch anew for each command would take minutes."""
    (tmp_path / "bad.yaml").write_text("prefill: {method: flexprefill, gama: 0.9}")
    (tmp_path / "gamma.yaml").write_text("prefill: {method: flexprefill, gamma: 1.7}")
    (tmp_path / "list.yaml").write_text("- prefill")
    (tmp_path / "calibration.yaml").write_text("prefill: {method: minference, calibration: no.json}")
    (tmp_path / "layers.yaml").write_text("prefill: {method: flexprefill, layers: [9]}")
    (tmp_path / "decode.yaml").write_text("decode: {method: dense}")
    (tmp_path / "delta3.yaml").write_text("decode: {method: delta}")
    (tmp_path / "short.txt").write_text("A few words.")
    (tmp_path / "rows.json").write_text('{"rows": [], "skipped": {}}')
    before = set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sparse-patch", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and len(error.splitlines()) == 1, error
    assert set(tmp_path.iterdir()) == before, "nothing half-written"


def test_debug_shows_the_trace(tmp_path: Path) -> None:
    result = run_as_user("show", str(tmp_path / "nope.yaml"), "--debug")
    assert result.returncode == 1 and "Traceback" in result.stderr and "ConfigError" in result.stderr


USAGE = [
    (["demo", "--length", "many"], "error: Invalid value for '--length': "),
    (["demo", "--length", "3"], "error: Invalid value for '--length': "),
    (["demo", "--length"], "error: Option '--length' requires an argument; see `sparse-patch"),
    (["demo", "--lenght", "3"], "error: No such option: --lenght"),
    (["shw", "dense"], "error: No such command 'shw'. Did you mean 'show'?; see `sparse-patch --help`"),
    (["bench", "x" * 100_000], "error: No such command 'xxx"),
    (["show"], "error: Missing argument 'config'; see `sparse-patch show --help`"),
    (["run", "a\nb\0"], "error: Invalid value for 'recipe': "),
]


@pytest.mark.parametrize("arguments, message", USAGE, ids=[" ".join(row[0])[:20] for row in USAGE])
def test_usage_errors_are_one_line_and_exit_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sparse-patch", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(message) and len(error) <= 500, error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, code", [([], 2), (["bench"], 2), (["--help"], 0), (["bench", "decode", "--help"], 0)]
)
def test_help_is_shown(
    arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sparse-patch", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code and "Usage: sparse-patch" in capsys.readouterr().out
