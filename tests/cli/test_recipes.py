"""Every recipe can be read, and everything that it names exists."""

import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from sparse_patch.artefacts.head_schedules import read_head_schedules
from sparse_patch.artefacts.layer_roles import read_calibration
from sparse_patch.artefacts.thresholds import read_thresholds
from sparse_patch.bench import decode, model, prefill
from sparse_patch.bench.common import ARCHITECTURES, architecture_of, shape_of
from sparse_patch.cli import main
from sparse_patch.cli.recipes import load_recipe
from sparse_patch.config import load_config
from sparse_patch.errors import SparsePatchError
from sparse_patch.evaluation.suite import configurations

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if "commands:" in path.read_text())


def options(arguments: list[str], name: str) -> list[str]:
    return [value for key, value in pairwise(arguments) if key == name]


@cache
def stock_tasks() -> set[str]:
    from lm_eval.tasks import TaskManager

    return set(TaskManager().all_tasks)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_what_exists(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.summary and recipe.needs and recipe.commands
    for arguments in recipe.arguments(path):
        assert arguments[0] in ("bench", "calibrate", "eval", "lm-eval")
        if arguments[0] == "eval":
            folder = Path(options(arguments, "--model")[0])
            assert (folder / "config.json").is_file() or (folder.parent / "make.py").is_file()
            assert len(configurations(options(arguments, "--config"))) >= 2
        elif arguments[0] == "bench":
            sources, (shape,) = options(arguments, "--config"), options(arguments, "--shape")
            if arguments[1] == "prefill":
                assert prefill.methods_of(sources, ARCHITECTURES.get(shape)) and shape_of(shape)
            else:
                architecture = architecture_of(shape)
                assert (
                    decode.methods_of(sources, architecture)
                    if arguments[1] == "decode"
                    else model.methods_of(sources, architecture.model_shape)
                )
        elif arguments[:2] == ["calibrate", "moa"]:
            made = read_head_schedules(options(arguments, "--out")[0]).header.settings
            assert made["lengths"] == [int(length) for length in options(arguments, "--lengths")[0].split(",")]
            assert made["density"] == float(options(arguments, "--density")[0])
        elif arguments[:2] == ["calibrate", "layers"]:
            made = read_calibration(options(arguments, "--out")[0]).header.settings
            assert made["length"] == int(options(arguments, "--length")[0])
        elif arguments[0] == "calibrate":
            found = read_thresholds(options(arguments, "--out")[0])
            assert options(arguments, "--error") == [f"{found.error:g}"]
            assert options(arguments, "--block-size") == [str(found.block_size)]
            made = found.header.settings
            assert all(made[key] == options(arguments, f"--{key}")[0] for key in ("lengths", "tasks", "seed"))
        else:
            (model_args,) = options(arguments, "--model_args")
            load_config(dict(item.split("=") for item in model_args.split(","))["config"])
            assert set(options(arguments, "--tasks")[0].split(",")) <= stock_tasks()


CYCLES = ["run {here}/r.yaml"], ["methods", "run '{here}/../a b/r.yaml'"], ["run {here}/other.yaml"]
COMMANDS = [
    (["show 'dense"], 'commands[0]: no closing quotation in "show \'dense"; close the quote or escape it'),
    (["methods", "show dense \\"], "commands[1]: no escaped character in 'show dense \\\\'; close the quote or"),
    (["methods", " "], "commands[1]: is empty; write what follows `sparse-patch`"),
    ([], "commands: list should have at least 1 item after validation, not 0; a recipe has the keys"),
    (["show dense", "shw dense"], "commands[1]: No such command 'shw'. Did you mean 'show'?"),
    (["eval --lenghts 4096"], "commands[0]: No such option: --lenghts"),
    (["eval --samples 0"], "commands[0]: Invalid value for '--samples': "),
    (["bench"], "commands[0]: names no command"),
    (["demo --help"], "commands[0]: asks for help, which is not a command to run"),
    (["methods", "methods --json no/such/m.json"], "commands[1]: no/such/m.json: cannot be written: "),
    (["export no/such/p.jsonl"], "commands[0]: no/such/p.jsonl: cannot be written: "),
    (["calibrate sale --out no/such/t.safetensors"], "commands[0]: no/such/t.safetensors: cannot be written: "),
    (["demo --plot a.docx"], "commands[0]: a.docx: cannot be drawn: expected one of ."),
    (["methods --json m.json\n" + "x" * 100_000], "commands[0]: Got unexpected extra argument"),
    *((commands, "runs itself, directly or through another recipe; remove that command") for commands in CYCLES),
]


@pytest.mark.parametrize("commands, message", COMMANDS, ids=[str(row[0])[:30] for row in COMMANDS])
def test_a_recipe_is_looked_at_before_its_first_command_runs(
    commands: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "a b"
    folder.mkdir()
    for name, content in (("r", commands), ("other", ["methods", "run {here}/r.yaml"])):
        content = [command.replace("run {here}/", "run '{here}'/") for command in content]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"summary": "s", "needs": "n", "commands": content}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sparse-patch", "run", "a b/r.yaml"])
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and message in said.err, said.err
    assert said.err.startswith("error: a b/") and said.err.count("\n") == 1 and len(said.err) <= 500
    assert {path.name for path in tmp_path.rglob("*")} == {"a b", "r.yaml", "other.yaml"}


def test_the_table_of_recipes_is_complete() -> None:
    text = (ROOT / "recipes" / "README.md").read_text()
    assert all(f"`{path.relative_to(ROOT / 'recipes')}`" in text for path in RECIPES) and len(RECIPES) >= 6


BAD = [
    ("summary: s\nneeds: n\n", "commands: field required; a recipe has the keys summary, needs, commands"),
    ("summary: s\nneeds: n\ncommands: [show dense]\nmodel: m\n", "model: extra inputs are not permitted"),
    ("summary: s\nneeds: n\ncommands: show dense\n", "commands: input should be a valid list"),
    ("a: [", "not valid YAML"),
]


@pytest.mark.parametrize("text, message", BAD)
def test_bad_recipes(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(SparsePatchError) as error:
        load_recipe(tmp_path / "r.yaml")
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(SparsePatchError, match=r"none.yaml: cannot be read"):
        load_recipe(tmp_path / "none.yaml")
