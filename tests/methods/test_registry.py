"""Methods from outside the package: classes of a notebook, and packages with entry points."""

import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from families import llama

import sparse_patch
from sparse_patch import ConfigError, PatchError, load_config, methods, patch_model, patched, sparsity_report
from sparse_patch.call import AttentionCall
from sparse_patch.integration.patch import is_patched
from sparse_patch.methods import Delta, FlexPrefill, Method, PrefillMethod, Quest, Selection, register_method
from sparse_patch.methods.base.registry import packaged_methods, registry
from sparse_patch.plans import BlockGrid

SMALL = {"min_length": 0, "block_size": 16}


def diagonal(call: AttentionCall, grid: BlockGrid) -> Selection:
    on_it = grid.query_block_ids[..., None] == torch.arange(grid.num_key_blocks)
    return Selection(on_it[:, None].expand(-1, call.q.shape[1], -1, -1))


class Diagonal(PrefillMethod):
    """The diagonal block only."""

    method: Literal["diagonal"] = "diagonal"

    def select(self, call: AttentionCall, grid: BlockGrid) -> Selection:
        return diagonal(call, grid)


def prefilled(model: Any, *config: Any, **settings: Any) -> dict[str, Any]:
    with torch.no_grad(), patched(model, *config, **settings):
        model(torch.randint(3, 90, (1, 120)))
        return sparsity_report(model).config


# --- Python first ----------------------------------------------------------------------------------------------------


def test_every_packaged_class_is_public() -> None:
    classes = {method.__name__: method for method in packaged_methods().values()}
    assert classes.keys() <= set(methods.__all__)
    for name in methods.__all__:
        assert getattr(methods, name) is classes.get(name, getattr(methods, name)), name


def test_phases_are_given_as_objects() -> None:
    model = llama()
    found = prefilled(model, prefill=FlexPrefill(gamma=0.9, min_length=0), decode=Quest(budget=64, min_length=0))
    assert found["prefill"]["gamma"] == 0.9 and found["decode"]["budget"] == 64
    same = load_config({"prefill": {"method": "flexprefill", "gamma": 0.9}, "decode": {"method": "quest"}})
    for config in (
        load_config(prefill=FlexPrefill(gamma=0.9), decode=Quest()),
        load_config([FlexPrefill(gamma=0.9), Quest()]),
        load_config({"prefill": FlexPrefill(gamma=0.9), "decode": Quest()}),
        load_config(FlexPrefill(), prefill={"gamma": 0.9}, decode=Quest()),
        load_config({"decode": {"method": "delta"}}, prefill=FlexPrefill(gamma=0.9), decode=Quest()),
    ):
        assert config.settings() == same.settings() and config.fingerprint() == same.fingerprint()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FlexPrefill(gamma=2), "FlexPrefill.gamma: expected less than or equal to 1, got int 2"),
        (lambda: FlexPrefill(gama=0.9), "FlexPrefill.gama: unknown key, did you mean 'gamma'?"),
        (lambda: Quest(budget=1), "Quest.budget: 1 is below 32"),
        (lambda: Delta(budget=None), "Delta.budget: missing; give budget in tokens or budget_ratio"),
        (lambda: load_config(prefill=Quest()), "arguments: prefill.method: expected one of a_shape, "),
        (lambda: load_config(), "config: missing; give a file, a name, a dict, a method or prefill= and decode="),
        (lambda: load_config([Quest(), Delta()]), "delta: decode: an earlier config of the list sets it too"),
    ],
)
def test_what_is_wrong_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_patched_model_is_patched_anew_if_asked() -> None:
    model, ids = llama(), torch.randint(3, 90, (1, 120))
    with torch.no_grad():
        before = model(ids).logits
        patch_model(model, FlexPrefill(min_length=0, min_budget=16, block_size=16))
        model(ids)
        with pytest.raises(PatchError, match="is patched already; pass replace=True, or call unpatch_model first"):
            patch_model(model, "quest")
        patch_model(model, "quest", replace=True)
        assert (
            sparsity_report(model).config["decode"]["method"] == "quest"
            and not sparsity_report(model).layers[0].prefill.calls
        )
        model(ids)
        sparse_patch.unpatch_model(model)
        assert torch.equal(model(ids).logits, before)
        patch_model(model, "quest", replace=True)
        assert is_patched(model), "a model without a patch is patched"


def test_a_patch_that_cannot_be_replaced_stays_with_its_counts() -> None:
    model, ids = llama(), torch.randint(3, 90, (1, 120))
    with torch.no_grad():
        patch_model(model, FlexPrefill(min_length=0, min_budget=16, block_size=16))
        expected = model(ids).logits
        for wrong in ("nothing.yaml", "delta"):  # no such file; no published choice for the model
            with pytest.raises(ConfigError):
                patch_model(model, wrong, replace=True)
            assert torch.equal(model(ids).logits, expected)
        report = sparsity_report(model)
        assert report.hook_active and report.layers[0].prefill.sparse_calls == 3


# --- classes of a notebook -------------------------------------------------------------------------------------------


def test_a_class_of_ones_own_runs_with_and_without_its_name(tmp_path: Path) -> None:
    model = llama()
    assert prefilled(model, Diagonal(**SMALL))["prefill"]["method"] == "diagonal"
    path = tmp_path / "mine.yaml"
    path.write_text("prefill: {method: diagonal, min_length: 0, block_size: 16}")
    with pytest.raises(ConfigError, match=r"mine\.yaml: prefill\.method: expected one of .*, got 'diagonal'"):
        load_config(path)
    assert register_method(Diagonal) is Diagonal
    assert prefilled(model, path)["prefill"]["method"] == "diagonal" and registry()["diagonal"] is Diagonal
    register_method(Diagonal)  # a notebook's cell runs again


def test_what_cannot_be_registered() -> None:
    class Other(Diagonal):
        pass

    class Taken(Diagonal):
        method: Literal["quest"] = "quest"  # type: ignore[assignment]

    class Unfinished(Method):
        method: Literal["unfinished"] = "unfinished"

    register_method(Diagonal)
    for method, message in (
        (Other, "register_method: Other.method: 'diagonal' is registered already, by .*; choose another name"),
        (Taken, "register_method: Taken.method: 'quest' is a method of sparse_patch; choose another name"),
        (Unfinished, "register_method: Unfinished: has no bind; write it"),
        (dict, "register_method: dict: expected a subclass of PrefillMethod, DecodeMethod or Method"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            register_method(method)  # type: ignore[type-var]


# --- packages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path in which packages with entry points lie as installers lay them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(folder: Path, name: str, source: str, **points: str) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(source))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "\n".join(f"{point} = {value}" for point, value in points.items())
    (info / "entry_points.txt").write_text(f"[sparse_patch.methods]\n{lines}\n")


SOURCE = """
    from typing import Literal
    import torch
    from sparse_patch.methods import PrefillMethod, Selection

    class Far(PrefillMethod):
        method: Literal["far"] = "far"

        def select(self, call, grid):
            near = grid.query_block_ids[..., None] == torch.arange(grid.num_key_blocks)
            return Selection(near[:, None].expand(-1, call.q.shape[1], -1, -1))
"""


def test_a_package_brings_its_method(package: Path) -> None:
    install(package, "far_package", SOURCE, far="far_package:Far")
    settings = {"method": "far", **SMALL}
    load_config("flexprefill")
    with pytest.raises(ConfigError, match=r"expected one of .*far, .* got 'nope'"):
        load_config({"prefill": {"method": "nope"}})
    assert "far_package" not in sys.modules, "it is imported by its name only"
    assert prefilled(llama(), {"prefill": settings})["prefill"]["method"] == "far"
    assert registry()["far"].__module__ == "far_package"
    sys.modules.pop("far_package")


def test_packages_that_do_not_work_are_one_line(package: Path) -> None:
    install(package, "broken_package", "import nothing_of_that_name", broken="broken_package:Method")
    install(package, "other_package", SOURCE, another="other_package:Far")
    install(package, "plain_package", "Far = 3", plain="plain_package:Far")
    install(package, "quest_package", "raise RuntimeError", quest="quest_package:Quest")
    for name, message in (
        ("broken", "the entry point broken_package:Method cannot be imported (No module named 'nothing_of_that_name')"),
        ("another", "the entry point other_package:Far is the method 'far'; give both the same name"),
        ("plain", "the entry point plain_package:Far: expected a subclass of PrefillMethod"),
    ):
        with pytest.raises(ConfigError) as error:
            load_config({"prefill": {"method": name}})
        assert message in str(error.value) and "\n" not in str(error.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_config("quest").decode is not None, "a packaged method has its name"
