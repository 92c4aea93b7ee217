"""The structure of the package: import directions, lengths of files and functions. Each check is made to fail too."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sparse_patch"
INTERNALS = "integration/transformers_internals.py"

MOST_MODULES = 12  # on the package's top level
MOST_FUNCTION_LINES = 60
MOST_FILE_LINES = 400
KERNELS = ("calibration/moa/influence_triton.py",)  # beside `triton*.py` and what is in a folder `triton`


def files_of(package: Path) -> dict[str, str]:
    """Path in the package -> text of the module."""
    return {path.relative_to(package).as_posix(): path.read_text("utf-8") for path in sorted(package.rglob("*.py"))}


def circles(package: str) -> Iterator[list[str]]:
    """Rooms of a folder, of any depth, that import each other in a circle; a folder's `__init__` is one of its rooms.

    An import in a function counts as one at the top of a module.
    """
    graph = grimp.build_graph(package, exclude_type_checking_imports=True, cache_dir=None)
    for folder in sorted(module for module in graph.modules if graph.find_children(module)):
        inside = {folder, *graph.find_descendants(folder)}
        depth = len(folder.split(".")) + 1
        room = {module: ".".join(module.split(".")[:depth]) for module in inside}
        below: dict[str, set[str]] = {}
        for module in inside:
            imported = {room[other] for other in graph.find_modules_directly_imported_by(module) & inside}
            below.setdefault(room[module], set()).update(imported - {room[module]})
        try:
            TopologicalSorter(below).prepare()
        except CycleError as error:
            yield error.args[1]


def long_files(package: Path) -> set[str]:
    return {path for path, text in files_of(package).items() if len(text.splitlines()) > MOST_FILE_LINES}


def long_functions(package: Path) -> set[str]:
    """Functions that are too long, except Triton kernels and their launchers, as "path: name"."""
    return {
        f"{path}: {node.name}"
        for path, text in files_of(package).items()
        if not _has_kernels(path)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno >= MOST_FUNCTION_LINES
    }


def _has_kernels(path: str) -> bool:
    room, *_ = parts = Path(path).parts
    return path in KERNELS or (room in ("ops", "kernels") and any(part.startswith("triton") for part in parts))


def private_names(text: str) -> set[str]:
    """Private names that a module reads from another object: `config._name`, or "_name" as a whole string."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return {name for name in found if name.startswith("_") and not name.startswith("__") and name.isidentifier()}


def modules_on_top(package: Path) -> list[str]:
    return [path.name for path in package.glob("*.py") if path.name != "__init__.py"]


# --- the package -----------------------------------------------------------------------------------------------------


def test_imports_run_downwards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _linted(ROOT, monkeypatch) == 0, "`lint-imports` says which import does not"


def test_no_rooms_import_each_other_in_a_circle() -> None:
    assert list(circles("sparse_patch")) == []


def test_files_and_functions_are_short() -> None:
    assert long_files(PACKAGE) == set()
    assert long_functions(PACKAGE) == set()


def test_the_top_level_has_few_modules() -> None:
    assert len(modules_on_top(PACKAGE)) <= MOST_MODULES


def test_private_names_of_transformers_are_in_one_module() -> None:
    texts = files_of(PACKAGE)
    private = private_names(texts.pop(INTERNALS))
    assert {"_attn_implementation", "_global_mapping", "_prepare_cache_for_generation"} <= private
    assert {path: names for path, text in texts.items() if (names := private_names(text) & private)} == {}


# --- the checks, on packages that are wrong --------------------------------------------------------------------------


def _linted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `lint-imports` for the pyproject.toml of a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])  # lint-imports changes it
    return lint_imports(config_filename=str(folder / "pyproject.toml"), no_cache=True, no_logo=True)


def _planted(folder: Path, changes: dict[str, str]) -> Path:
    """A package with empty rooms that have the names of this package's rooms; some get a text."""
    rooms = [path.name.removesuffix(".py") for path in PACKAGE.iterdir() if _is_room(path)]
    texts = {"__init__.py": "", **{f"{room}/__init__.py": "" for room in rooms}, **changes}
    for path, text in texts.items():
        (folder / "planted" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "planted" / path).write_text(text)
    contract = (ROOT / "pyproject.toml").read_text().replace('"sparse_patch"', '"planted"')
    (folder / "pyproject.toml").write_text(contract)
    return folder / "planted"


def _is_room(path: Path) -> bool:
    return (path / "__init__.py").exists() or (path.suffix == ".py" and path.name != "__init__.py")


@pytest.mark.parametrize(
    "room, text, code",
    [
        ("cli", "from planted import errors, bench", 0),
        ("report", "from planted.integration import patching", 1),
        ("report", "def late():\n    from planted import cli", 1),
        ("bench", "import planted.evaluation", 1),
        ("methods", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import planted.config", 0),
        ("testing", "from planted import bench", 0),
        ("testing", "from planted import cli", 1),
        ("parlour", "", 1),
    ],
)
def test_an_import_upwards_is_found(
    room: str, text: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _planted(tmp_path, {"integration/patching.py": "", f"{room}/__init__.py": text})
    assert _linted(tmp_path, monkeypatch) == code


def test_a_circle_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = "def late():\n    from planted.ops.attention import span"
    texts = {
        "ops/attention/__init__.py": "",
        "ops/attention/span.py": "from planted.ops.selection import pages",
        "ops/selection/__init__.py": "",
        "ops/selection/pages.py": late,
        "plans/__init__.py": "from planted.plans.grid import Grid",
        "plans/grid.py": "from planted.plans import Plan",
    }
    _planted(tmp_path, texts)
    monkeypatch.syspath_prepend(tmp_path)
    assert [set(circle) for circle in circles("planted")] == [
        {"planted.ops.attention", "planted.ops.selection"},
        {"planted.plans", "planted.plans.grid"},
    ]


def test_what_is_long_is_found(tmp_path: Path) -> None:
    just, over = ("def f():\n" + "    pass\n" * lines for lines in (MOST_FUNCTION_LINES - 1, MOST_FUNCTION_LINES))
    texts = {
        "cli/a.py": just,
        "cli/b.py": f"class C:\n    {over.replace(chr(10), chr(10) + '    ')}",
        "cli/triton.py": over,
        "ops/span/triton.py": over,
        "ops/span/triton/plan.py": over,
        "calibration/moa/influence_triton.py": over,
        "plans/a.py": "\n" * MOST_FILE_LINES,
        "plans/b.py": "\n" * (MOST_FILE_LINES + 1),
    }
    package = _planted(tmp_path, texts | {f"a_room_{number}.py": "" for number in range(MOST_MODULES + 1)})
    assert long_functions(package) == {"cli/b.py: f", "cli/triton.py: f"}
    assert long_files(package) == {"plans/b.py"}
    assert len(modules_on_top(package)) == MOST_MODULES + 1


def test_a_private_name_is_found() -> None:
    text = 'x = config._attn_implementation\ny = getattr(model, "_tp_size")\nself._mine = model.__dict__ or "_ or so"'
    assert private_names(text) == {"_attn_implementation", "_tp_size"}
