"""Run what the documents show: examples, snippets and commands, on the shipped model and at test sizes."""

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
import typer
from lm_eval._cli import HarnessCLI
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparse_patch
from sparse_patch import SparsePatchError, load_config
from sparse_patch.bench import common
from sparse_patch.cli import app, checked_commands, parsed
from sparse_patch.evaluation.document import needle_document
from sparse_patch.evaluation.lm_eval import TASKS
from sparse_patch.integration.patch import is_patched
from sparse_patch.kernels import availability
from sparse_patch.model_shape import ModelShape

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    str(path.relative_to(ROOT / "recipes"))
    for path in (ROOT / "recipes").rglob("*.yaml")
    if "commands:" in path.read_text()
)
SMALL = {  # options that make a command quick; the last value of an option counts
    "": {"--samples": "1", "--repeats": "1", "--needles": "1", "--tasks": "niah_single_1", "--batch": "1"},
    "demo": {"--length": "1024"},
    "eval": {"--lengths": "256"},
    "bench": {"--lengths": "128", "--budgets": "64", "--densities": "0.5", "--new-tokens": "3", "--chunk": "64"},
    "calibrate": {"--length": "1024", "--lengths": "512", "--validate-length": "576", "--validate-samples": "1"},
}
OFFLINE = "needle_niah_single_1"  # instead of lm-eval's tasks, whose data are on a hub


# --- what a document shows -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A block of code in a page: Python or shell lines."""

    section: str
    line: int
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The commands of `sparse-patch`, without lines that stand for several commands."""
        lines = self.text.replace("\\\n", " ").splitlines()
        split = [shlex.split(line, comments=True) for line in lines if line.startswith("sparse-patch ")]
        return [words[1:] for words in split if not {"|", "..."} & set(words)]

    @property
    def is_python(self) -> bool:
        try:
            ast.parse(self.text)
        except SyntaxError:
            return False
        return True


def shown(page: str) -> Iterator[Shown]:
    """The code blocks of a page, fenced or indented by four spaces."""
    section, block, start, fenced = "", list[str](), 0, False
    for number, line in enumerate([*(ROOT / page).read_text(encoding="utf-8").splitlines(), "end"], start=1):
        fence = re.match(" {0,3}```", line)
        if not fence and (fenced or line.startswith("    ") or (block and not line)):
            start = start if block else number
            block.append(line)
            continue
        if block:
            yield Shown(section, start, textwrap.dedent("\n".join(block) + "\n"))
        block, fenced = [], bool(fence) and not fenced
        section = line[3:] if line.startswith("## ") else section


def small(arguments: list[str]) -> list[str]:
    """A command with test sizes."""
    command: Any = typer.main.get_command(app)
    for word in arguments:
        command = getattr(command, "commands", {}).get(word, command)
    known = {name for option in command.params for name in option.opts}
    sizes = {**SMALL[""], **SMALL.get(arguments[0], {})}
    return [*arguments, *(word for name, value in sizes.items() if name in known for word in (name, value))]


def run(arguments: list[str]) -> None:
    app(arguments, prog_name="sparse-patch", standalone_mode=False)


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink the benchmarks' models to the heads and layers of the real ones; each row is timed once."""
    monkeypatch.setattr(common, "_CPU_RUNS", (1, 1))
    monkeypatch.setattr(availability, "_interprets", lambda: False)  # as outside of tests
    shapes = {name: replace(shape, head_dim=64) for name, shape in common.SHAPES.items()}  # those of needle-llama
    monkeypatch.setattr(common, "SHAPES", shapes)
    small = {"hidden": 64, "intermediate": 64, "vocabulary": 128}
    real = {replace(each.model_shape, hidden_size=64): each.model_shape for each in common.ARCHITECTURES.values()}
    shape_of: Any = ModelShape.of

    def as_methods_see_it(config: Any, num_layers: int) -> ModelShape:
        shape = shape_of(config, num_layers)
        return real.get(shape, shape)

    monkeypatch.setattr(ModelShape, "of", as_methods_see_it)
    for name, architecture in list(common.ARCHITECTURES.items()):
        kind = type("Small", (common.Architecture,), {"model_shape": architecture.model_shape})
        heads = replace(architecture.heads, head_dim=16)
        monkeypatch.setitem(common.ARCHITECTURES, name, kind(**{**vars(architecture), **small, "heads": heads}))


# --- examples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    answered, expected = re.findall(r"answered '\s*(\d+)', expected '(\d+)'", said)[0]
    assert answered == expected and "1 of 1" in said, said


# --- snippets and commands of the pages ------------------------------------------------------------------------------

PAGES = ("README.md", "recipes/README.md", "examples/README.md", "docs/models.md", "CONTRIBUTING.md")
SHOWN = {page: list(shown(page)) for page in PAGES}
SECTIONS = [(page, section) for page in PAGES[:-1] for section in dict.fromkeys(each.section for each in SHOWN[page])]


@pytest.fixture(scope="module")
def tokenizer(needle_llama_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(needle_llama_path)


@pytest.fixture
def of_the_reader(needle_llama_path: Path, tokenizer: Any) -> dict[str, Any]:
    """The names that snippets assume."""
    document = needle_document(tokenizer, length=4400, needles=2)
    manager = TaskManager(
        include_path=[TASKS],
        include_defaults=False,
        metadata={"max_seq_lengths": [512], "num_samples": 1, "tokenizer": str(needle_llama_path)},
    )
    evaluate = partial(lm_eval.simple_evaluate, task_manager=manager, bootstrap_iters=0)
    return {
        "path": str(needle_llama_path),
        "tokenizer": tokenizer,
        "model": AutoModelForCausalLM.from_pretrained(needle_llama_path, dtype=torch.float32).eval(),
        "inputs": tokenizer(document.text + document.questions[0].text, return_tensors="pt"),
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "sparse_patch": sparse_patch,
        "lm_eval": SimpleNamespace(simple_evaluate=lambda model, tasks: evaluate(model=model, tasks=[OFFLINE])),
    }


@pytest.mark.parametrize("page, section", SECTIONS, ids=[f"{page}-{section}" for page, section in SECTIONS])
def test_what_a_page_shows(
    page: str,
    section: str,
    of_the_reader: dict[str, Any],
    small_shapes: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run the page from top to bottom in a new folder, with earlier blocks' imports. No silent fallbacks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        "prefill: {method: flexprefill, block_size: 32, min_budget: 256, min_length: 512}"
    )
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # they take long
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for block in SHOWN[page]:
        if block.is_python:
            code = ast.parse(block.text)
            imports = [node for node in code.body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), f"<{page}>", "exec"), of_the_reader)
        if block.section != section:
            continue
        for command in block.commands:
            run_shown(command, of_the_reader["path"])
        if block.is_python:
            run_python(page, block, of_the_reader)


def run_python(page: str, block: Shown, names: dict[str, Any]) -> None:
    if "SparseLM(model" in block.text:
        sparse_patch.patch_model(names["model"], "flexprefill.yaml")  # as the snippet says
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "sparse_patch: ")  # warnings of fallbacks to dense attention
        exec(compile("\n" * (block.line - 1) + block.text, f"<{page}>", "exec"), names)
    if is_patched(names["model"]):
        assert not sparse_patch.sparsity_report(names["model"]).fallbacks()
        sparse_patch.unpatch_model(names["model"])


def run_shown(command: list[str], path: str) -> None:
    words = [re.sub("PATH_OR_ID|PATH", path, word) for word in command]
    if words[0] == "lm-eval":
        words[words.index("--tasks") + 1] = OFFLINE
        words += ["--limit", "1", "--metadata", '{"max_seq_lengths": [512], "num_samples": 1}']
    if words[0] == "demo":
        words += ["--config", "mine.yaml"]  # the packaged one is for longer prompts
    if words[0] == "run" and "--dry-run" not in words:
        words.append("--dry-run")  # test_recipes_run runs them
    parsed(words, "page")
    run(small(words))


def test_commands_that_stand_for_several() -> None:
    """Every command in lines such as `sparse-patch eval | tasks | export` exists."""
    lines = [
        line for block in SHOWN["README.md"] for line in block.text.splitlines() if re.match(r"sparse-patch.* \|", line)
    ]
    assert len(lines) >= 3
    for line in lines:
        first, *others = line.partition("  #")[0].partition(" # ")[0].split(" | ")
        *group, name = first.split()[1:]
        for each in (name, *others):
            with pytest.raises(SparsePatchError, match=r"^page: asks for help"):
                parsed([*group, each.strip(), "--help"], "page")


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_the_guide_can_be_followed(
    phase: str, of_the_reader: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CONTRIBUTING's commands and Python blocks, from top to bottom, in a new folder."""
    monkeypatch.chdir(tmp_path)
    blocks = SHOWN["CONTRIBUTING.md"]
    (command,) = (command for block in blocks for command in block.commands)
    run([phase if word == "prefill" else word for word in command])
    assert len(list(tmp_path.iterdir())) == 4
    of_the_reader["__name__"] = "guide"
    python = [block for block in blocks if block.is_python and "\n" in block.text.strip()]
    assert sum("check_method(" in block.text for block in python) == 1 and len(python) >= 4
    for block in python:
        exec(compile("\n" * (block.line - 1) + block.text, "<CONTRIBUTING.md>", "exec"), of_the_reader)
    assert is_patched(of_the_reader["model"])


def test_the_guide_names_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"`([\w./-]+/[\w./-]*|[\w]+\.py)`", text):
        places = [ROOT / path, ROOT / "sparse_patch" / path, ROOT / "sparse_patch" / "integration" / path]
        generic = "<" in path or path in ("torch.py", "triton.py")
        assert generic or any(place.exists() for place in places), path


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """A copy of the recipes, because some write next to themselves; its folder has a name that a shell would split."""
    folder = tmp_path / "a 'copy' of $HOME" / "recipes"
    shutil.copytree(ROOT / "recipes", folder)
    (folder.parent / "examples").symlink_to(ROOT / "examples")
    fetched = folder / "smollm2" / "model"
    shutil.rmtree(fetched, ignore_errors=True)
    fetched.symlink_to(ROOT / "examples" / "needle-llama")  # stands for the weights that make.py fetches
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run(
    name: str,
    recipes: Path,
    small_shapes: None,
    monkeypatch: pytest.MonkeyPatch,
    needle_llama_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run every recipe. Those that need a hub run until lm-eval has read their arguments."""
    monkeypatch.chdir(recipes.parent)
    asked: list[Any] = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda self, arguments: asked.append(arguments))
    monkeypatch.setattr("sparse_patch.evaluation.lm_eval.command._results_in", lambda path: nullcontext())
    for arguments in checked_commands(recipes / name):
        run(arguments if arguments[0] == "lm-eval" else small(arguments))
        for option, file in pairwise(arguments):
            assert option not in ("--json", "--plot", "--out") or Path(file).stat().st_size
    for arguments in asked:
        assert arguments.model == "hf-sparse" and load_config(arguments.model_args["config"])


@pytest.mark.parametrize("name", RECIPES)
def test_printed_commands_can_be_pasted(name: str, recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shell gets the words that would run, whatever the folder's name is."""
    run(["run", str(recipes / name), "--dry-run"])
    printed = capsys.readouterr().out
    shell = subprocess.run(
        ["bash", "-c", f"sparse-patch() {{ printf '%s\\0' \"$@\"; printf '\\n'; }}\n{printed}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split("\0") for line in shell.stdout.split("\0\n")[:-1]] == checked_commands(recipes / name)
