"""The support table of docs/ shows what is measured, and it keeps the project's promises."""

import json
import warnings
from pathlib import Path

import pytest
import transformers

from benchmarks.support.page import answers_of, page
from benchmarks.support.probe import NOT_ATTENTION, NOT_COMPILED, WRONG, measure
from benchmarks.support.rows import FAMILIES
from sparse_patch.methods.base.registry import registry
from sparse_patch.methods.base.spans import SpanMethod

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


COMMITTED = json.loads((ROOT / "docs" / "support.json").read_text(encoding="utf-8"))
SPANS = [name for name, method in registry().items() if issubclass(method, SpanMethod)]
PAGES = [name for name, method in registry().items() if method.phases == ("decode",)]


def by_way(committed: str | dict[str, str], ways: list[str]) -> dict[str, str]:
    return {way: committed if isinstance(committed, str) else committed[way] for way in ways}


def assert_is_committed(family: str, device: str) -> None:
    """Check every method in every way, but compile (ten seconds each) only one method: of pages or of spans, in turn.

    With images nothing is compiled, because the text towers are those of other rows.
    """
    if transformers.__version__ != COMMITTED["versions"]["transformers"]:
        pytest.skip("the table is of another version of Transformers; make support measures this one")
    turn = list(FAMILIES).index(family)
    has_images = FAMILIES[family].inputs is not None
    in_turn = (PAGES, SPANS)[turn % 2]
    compiled = set() if has_images else {in_turn[turn // 2 % len(in_turn)]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = measure(family, compiled, device)
    committed = COMMITTED["families"][family]
    assert {key: committed[key] for key in ("models", "layers")} == {key: measured[key] for key in ("models", "layers")}
    assert list(committed["methods"]) == list(measured["methods"])
    for method, kinds in measured["methods"].items():
        for kind, phases in kinds.items():
            for phase, found in phases.items():
                expected = by_way(committed["methods"][method][kind][phase], list(found))
                assert found == expected, f"{method}, {kind} layers, {phase}: run make support"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_what_is_measured(family: str) -> None:
    assert_is_committed(family, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_that_of_a_gpu_too(family: str) -> None:
    """Run the GPU's kernels."""
    assert_is_committed(family, "cuda")


def test_the_page_is_made_of_the_table() -> None:
    committed = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert committed == page(COMMITTED), "run make support"


def test_the_table_has_every_family_and_every_method() -> None:
    assert set(COMMITTED["families"]) == set(FAMILIES)
    for family in COMMITTED["families"].values():
        assert set(family["methods"]) == set(registry())
        for kinds in family["methods"].values():
            assert set(kinds) == set(family["layers"])
    assert WRONG not in json.dumps(COMMITTED)


def answers(family: str, kind: str, method: str) -> set[str]:
    """All answers of a method in layers of one kind, over all phases and ways."""
    found: set[str] = answers_of(COMMITTED["families"][family]["methods"][method][kind])
    return found


METHODS = sorted(set(registry()) - {"dense"})
SPARSE = ["llama", "mistral_full", "qwen2", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "gemma", "gemma2", "gemma3"]
SPARSE += [
    "gemma3n",
    "gemma4",
    "minicpm",
    "minicpm3",
    "phi3",
    "granite",
    "gpt_oss",
    "mllama",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_5_vl",
    "gemma4_vlm",
]


@pytest.mark.parametrize("family", SPARSE)
def test_full_layers_are_sparse_whatever_runs_them(family: str) -> None:
    assert {method: answers(family, "full", method) for method in METHODS} == {method: {"sparse"} for method in METHODS}


def test_full_layers_of_llama_4_are_sparse() -> None:
    for method in METHODS:
        assert answers("llama4", "full", method) - {NOT_COMPILED} == {"sparse"}


@pytest.mark.parametrize("family", ["gemma3n", "gemma4", "gemma4_vlm"])
def test_layers_that_share_keys_are_sparse(family: str) -> None:
    """Two methods need more than the one query that Gemma 4 has in these layers when `generate` reads a prompt."""
    for method in METHODS:
        expected = {"sparse"}
        if method in ("flexprefill", "minference") and family != "gemma3n":
            expected |= {"dense: no more queries than the selection itself attends to"}
        assert answers(family, "full, shared keys", method) == expected


@pytest.mark.parametrize(
    "family, kind, reason",
    [
        *((family, "sliding", "dense: sliding-window layer") for family in ("gemma2", "gemma3", "gemma3n", "gemma4")),
        ("gpt_oss", "sliding", "dense: sliding-window layer"),
        ("llama4", "chunked", "dense: chunked layer"),
        ("qwen3_next", "linear", NOT_ATTENTION),
        ("qwen3_5", "linear", NOT_ATTENTION),
        ("mllama", "cross", NOT_ATTENTION),
    ],
)
def test_other_layers_stay_as_the_model_has_them(family: str, kind: str, reason: str) -> None:
    for method in METHODS:
        assert answers(family, kind, method) - {NOT_COMPILED} == {reason}


def test_the_tiny_models_are_what_the_rows_say() -> None:
    full = {name: FAMILIES[name].build().config for name in ("gemma2", "gemma3", "gemma4", "minicpm3")}
    assert full["gemma2"].attn_logit_softcapping == 50 and full["gemma3"].head_dim == 256
    assert [layer.head_dim for layer in full["gemma4"].per_layer_config[:2]] == [256, 512]
    assert full["minicpm3"].v_head_dim != full["minicpm3"].qk_nope_head_dim + full["minicpm3"].qk_rope_head_dim
