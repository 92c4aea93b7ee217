"""What the README says is what the project has."""

import importlib.util
import re
from pathlib import Path

from sparse_patch.methods.base import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_results() -> None:
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "benchmarks" / "update_readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.updated(README) == README, "run python benchmarks/update_readme.py"


def test_links_and_files_exist() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "examples/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_table_of_methods_is_complete() -> None:
    assert {f"`{name}.yaml`" for name in registry()} <= set(re.findall(r"`[a-z]+\.yaml`", README))
