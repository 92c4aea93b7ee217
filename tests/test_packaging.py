"""The wheel is built, installed in a fresh environment and used from an empty folder. The package imports fast."""

import ast
import importlib
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import sparse_patch

ROOT = Path(__file__).parent.parent

SCRIPT = """
import sparse_patch, torch, transformers
config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=1)
model = transformers.LlamaForCausalLM(config).eval()
sparse_patch.patch_model(model, "flexprefill.yaml")
with torch.no_grad():
    model(torch.ones(1, 8, dtype=torch.long))
print(sparse_patch.__file__, sorted(sparse_patch.packaged_configs()), len(sparse_patch.sparsity_report(model).layers))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


def test_it_holds_the_package_and_the_configs_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"sparse_patch/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= set(names)
    assert {"sparse_patch/py.typed", "sparse_patch/workbench/words.txt"} <= set(names)
    assert "sparse_patch/evaluation/lm_eval_tasks/_needle.yaml" in names
    assert all(name.startswith(("sparse_patch/", "sparse_patch-")) for name in names)
    assert wheel.stat().st_size < 1_000_000


def test_patch_model_works_from_the_wheel_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    """Only the dependencies come from the tests' environment, which has the checkout as an editable install."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True, text=True)
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    # A .pth line adds the folder but not the .pth files in it, so the editable install stays out of sight.
    (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    result = subprocess.run([python, "-I", "-c", SCRIPT], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(tmp_path / "env"))
    assert "flexprefill.yaml" in result.stdout and result.stdout.strip().endswith(" 1")


def _import_of(code: str) -> set[str]:
    """The modules that a fresh process has after running some code."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT).split())


def test_the_import_is_light() -> None:
    loaded = _import_of("import sparse_patch; dir(sparse_patch); sparse_patch.__version__; sparse_patch.ConfigError")
    assert "sparse_patch" in loaded
    assert not loaded & {"torch", "transformers", "triton", "numpy", "pydantic", "yaml", "rich", "typer"}
    assert {"sparse_patch.config", "pydantic"} <= _import_of("from sparse_patch import load_config")


def test_every_public_name_resolves_and_is_listed() -> None:
    """Each name is in `__all__` and in `dir`, and type checkers find it in the module that it has at run time."""
    assert sparse_patch.__all__ == sorted(sparse_patch.__all__) and set(sparse_patch.__all__) <= set(dir(sparse_patch))
    tree = ast.parse(Path(sparse_patch.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    typed = {alias.name: node.module or "" for node in imports for alias in node.names if "sparse_patch" in node.module}
    assert set(typed) == set(sparse_patch.__all__) and set(sparse_patch._MODULE_OF).issubset(typed)
    for name, module in typed.items():
        assert getattr(sparse_patch, name) is getattr(importlib.import_module(module), name), name
        assert sparse_patch._MODULE_OF.get(name, module) == module, name
        assert not (ROOT / "sparse_patch" / f"{name}.py").exists(), f"{name}: a module would stand in its place"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sparse_patch.nothing  # noqa: B018
    with pytest.raises(ImportError):
        exec("from sparse_patch import nothing")
