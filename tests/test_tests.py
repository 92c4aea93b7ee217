"""Tests of the tests: code that several tests need is in no test module."""

import ast
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parent
MODULES = sorted(TESTS.rglob("test_*.py"))


def imported(module: Path) -> set[str]:
    """The last part of the name of every imported module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(alias.name for alias in node.names)}
    return {name.rpartition(".")[2] for name in names}


def test_no_test_imports_a_test() -> None:
    tests = {module.stem for module in MODULES}
    assert not {module.name: found for module in MODULES if (found := imported(module) & tests)}


def test_names_of_test_modules_are_unique() -> None:
    """pytest imports test modules by their names only."""
    assert max(Counter(module.stem for module in MODULES).values()) == 1
