"""`sparse-patch new-method`: what it writes passes its own tests, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
from commands import run

from sparse_patch import SparsePatchError
from sparse_patch.call import Phase
from sparse_patch.testing.scaffold import Scaffold

ROOT = Path(__file__).parent.parent.parent


def tried(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_it_writes_a_method_that_passes(phase: Phase, tmp_path: Path) -> None:
    printed = run("new-method", "my_method", "--phase", phase, "--folder", str(tmp_path)).stdout
    assert 'my_method = "my_method:MyMethod"' in printed and "python -m pytest" in printed
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"my_method.py", "my_method.yaml", "oracle_my_method.py", "test_my_method.py"}
    passed = tried(tmp_path, "pytest", "-q", "-p", "no:cacheprovider")
    assert "2 passed" in passed.stdout, passed.stdout + passed.stderr
    loaded = tried(
        tmp_path, "timeit", "-n1", "-r1", "import my_method, sparse_patch; sparse_patch.load_config('my_method.yaml')"
    )
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_in_a_checkout_each_file_has_its_place_and_lint_is_clean(phase: Phase, tmp_path: Path) -> None:
    for place in ("sparse_patch/methods", "configs", "tests/oracles", "tests/methods"):
        (tmp_path / place).mkdir(parents=True)
    known = '\n[tool.ruff.lint.isort]\nknown-first-party = ["sparse_patch"]\n'  # most of it is not there
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + known)
    files = Scaffold("my_method", phase, tmp_path).write()
    assert [str(path.relative_to(tmp_path)) for path in files] == [
        "sparse_patch/methods/my_method.py",
        "configs/my_method.yaml",
        "tests/oracles/my_method.py",
        "tests/methods/test_my_method.py",
    ]
    for arguments in (["check", "."], ["format", "--check", "."]):
        linted = tried(tmp_path, "ruff", *arguments)
        assert linted.returncode == 0, linted.stdout


def test_what_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("mine")
    for name, folder, message in (
        ("My-Method", tmp_path, "NAME: expected lower-case letters, digits and underscores, a letter first, got 'My-"),
        ("quest", tmp_path, "NAME: quest is a method already; choose another name"),
        ("there", tmp_path, "there.yaml: exists already; choose another name or folder"),
        ("mine", tmp_path / "nowhere", "cannot be written: "),
    ):
        with pytest.raises(SparsePatchError) as error:
            Scaffold(name, "prefill", folder).write()
        assert message in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]
    refused = run("new-method", "mine", "--phase", "both", "--folder", str(tmp_path))
    assert refused.stderr == "error: --phase: expected prefill or decode, got 'both'\n" and refused.returncode == 2
