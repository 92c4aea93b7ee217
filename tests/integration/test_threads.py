"""Threads that share a patched model, and models that are patched while a forward runs."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.model_state import marks
from families import FAMILIES, llama
from method_table import configurations
from together import answer, at_once, prompts, wrong_answers
from torch import nn
from transformers import PreTrainedModel

from sparse_patch import (
    PatchError,
    SparsePatchError,
    growing_cache,
    patch_model,
    patched,
    reset_report,
    sparsity_report,
    unpatch_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SPARSE = {"prefill": {"method": "a_shape", "block_size": 16, "sink": 16, "window": 16, "min_length": 0}}
NAMES = list(configurations(Path()))


@pytest.mark.parametrize("name", NAMES)
def test_threads_answer_what_one_thread_does(name: str, plans: Path, five_layers: PreTrainedModel) -> None:
    number = 2 + NAMES.index(name) % 2
    with patched(five_layers, {**configurations(plans)[name], "on_unsupported": "error"}):
        assert wrong_answers(five_layers, prompts([260, 200, 300][:number]), new=6) == []
        layer = sparsity_report(five_layers).layers[1]
    assert layer.prefill.sparse_calls + layer.decode.sparse_calls >= 2 * number, "nothing was sparse"
    assert layer.prefill.calls >= 2 * number, "a call was lost"


@pytest.mark.parametrize("name", ["tidaldecode", "kinetics", "streamingllm"])
def test_threads_with_static_caches(name: str, plans: Path, five_layers: PreTrainedModel) -> None:
    options = {"cache_implementation": "static", "disable_compile": True}
    with patched(five_layers, configurations(plans)[name]):
        assert wrong_answers(five_layers, prompts([180, 150]), new=5, **options) == []


def test_a_report_is_read_while_threads_count(five_layers: PreTrainedModel, plans: Path) -> None:
    first, second = prompts([60, 50])
    with patched(five_layers, configurations(plans)["quest-kv_group-max-added"]):
        found = at_once(
            [
                lambda: [str(sparsity_report(five_layers)) for _ in range(10)],
                lambda: [reset_report(five_layers) for _ in range(10)],
                lambda: answer(five_layers, first, 6),
                lambda: answer(five_layers, second, 6),
            ]
        )
    assert not [result for result in found if isinstance(result, Exception)]


# A model that is patched and unpatched by one thread while another uses it.


def outcomes(work: Callable[[], torch.Tensor], expected: list[torch.Tensor], rounds: int) -> set[str]:
    """The outcomes of a forward that runs again and again: one of the expected results, or an error in one line."""
    found = set()
    for _ in range(rounds):
        try:
            result = work()
        except SparsePatchError as error:
            assert "\n" not in str(error) and "run the forward again" in str(error), error
            found.add("refused")
        else:
            matches = [torch.allclose(result, one, atol=1e-4) for one in expected]
            found.add(("unpatched", "patched")[matches.index(True)] if any(matches) else "WRONG")
    return found


@pytest.mark.parametrize("family, pad", [("llama", 0), ("gemma2", 9)])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_forwards_while_the_model_is_patched_and_unpatched(family: str, pad: int, phase: str, plans: Path) -> None:
    model, config = FAMILIES[family](), {**SPARSE, **configurations(plans)["quest-kv_group-max-added"]}
    ids = torch.randint(3, 90, (2, 111))
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    cache = growing_cache(model.config)
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)

    @torch.no_grad()
    def prefill() -> torch.Tensor:
        logits: torch.Tensor = model(ids, attention_mask=mask, use_cache=False).logits
        return logits

    @torch.no_grad()
    def step() -> torch.Tensor:
        of_its_own = copy.deepcopy(cache)  # a forward that is refused leaves some layers a token behind
        logits: torch.Tensor = model(ids[:, -1:], attention_mask=mask, past_key_values=of_its_own).logits
        return logits

    work = prefill if phase == "prefill" else step
    expected = [work()]
    with patched(model, config):
        expected.append(work())
    assert not torch.allclose(*expected, atol=1e-4)

    def patching() -> None:
        for _ in range(25):
            with patched(model, config):
                torch.randn(40, 40).softmax(-1)

    found, error = at_once([lambda: outcomes(work, expected, 40), patching])
    assert error is None and found <= {"unpatched", "patched", "refused"}, (found, error)
    assert torch.equal(work(), expected[0]) and marks(model) == []


def test_one_thread_patches_at_a_time() -> None:
    model = llama()
    for _ in range(3):
        found = at_once([lambda: patch_model(model, SPARSE)] * 4)
        errors = [result for result in found if result is not model]
        assert len(errors) == 3 and all(isinstance(error, PatchError) for error in errors)
        assert all("patched already" in str(error) for error in errors)
        assert len(sparsity_report(model).layers) == 3
        found = at_once([lambda: unpatch_model(model)] * 3)
        errors = [result for result in found if result is not model]
        assert len(errors) == 2 and all("is not patched" in str(error) for error in errors)
        assert marks(model) == []


def test_two_models_are_patched_at_once() -> None:
    models = [llama(), FAMILIES["gemma2"]()]
    ids = torch.arange(3, 83)[None]

    @torch.no_grad()
    def work(model: PreTrainedModel) -> bool:
        before = model(ids).logits
        with patched(model, SPARSE):
            sparse = model(ids).logits
        for _ in range(4):
            with patched(model, SPARSE):
                assert torch.equal(model(ids).logits, sparse)
            assert torch.equal(model(ids).logits, before)
        return True

    assert at_once([lambda model=model: work(model) for model in models]) == [True, True]


# The same at moments that are chosen: a hook of PyTorch's patches the model in the middle of a forward.


class Meddler:
    """Hooks before a module of every layer that patch or unpatch the model, as `plan` says for a forward."""

    def __init__(self, model: PreTrainedModel, place: str) -> None:
        self.model, self.plan = model, dict[int, list[str]]()
        for layer, module in enumerate(model.model.layers):
            before: nn.Module = module.get_submodule(place)
            before.register_forward_pre_hook(lambda *_, layer=layer: self.meddle(layer))

    def meddle(self, layer: int) -> None:
        for action in self.plan.pop(layer, []):
            (patch_model(self.model, SPARSE) if action == "patch" else unpatch_model(self.model))

    @torch.no_grad()
    def run(self, plan: dict[int, list[str]], **inputs: Any) -> torch.Tensor:
        self.plan = dict(plan)
        logits: torch.Tensor = self.model(**inputs, use_cache=False).logits
        return logits


AGAIN = ["unpatch", "patch"]
PLACES = pytest.mark.parametrize("place", ["", "self_attn"], ids=["layer", "attention"])
MODELS = pytest.mark.parametrize("family, pad", [("llama", 0), ("llama", 7), ("gemma2", 7)])


def meddled(family: str, pad: int, place: str) -> tuple[Meddler, dict[str, torch.Tensor]]:
    ids = torch.randint(3, 90, (2, 80))
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    return Meddler(FAMILIES[family](), place), {"input_ids": ids, "attention_mask": mask}


@PLACES
@MODELS
@pytest.mark.parametrize(
    "plan", [{0: ["patch"]}, {1: ["patch"]}, {1: ["patch"], 2: ["unpatch"]}, {1: ["patch", *AGAIN], 2: AGAIN}], ids=str
)
def test_a_model_that_is_patched_in_a_forward(family: str, pad: int, place: str, plan: dict[int, list[str]]) -> None:
    """The forward begins unpatched and finishes unpatched."""
    meddler, inputs = meddled(family, pad, place)
    plain = meddler.run({}, **inputs)
    torch.testing.assert_close(meddler.run(plan, **inputs), plain, atol=1e-5, rtol=1e-5)
    if hasattr(meddler.model, "sparse_patch"):
        assert not torch.allclose(meddler.run({}, **inputs), plain, atol=1e-3), "the next one is sparse"
        unpatch_model(meddler.model)
    assert marks(meddler.model) == [] and torch.equal(meddler.run({}, **inputs), plain)


@PLACES
@MODELS
@pytest.mark.parametrize(
    "plan", [{0: ["unpatch"]}, {0: AGAIN}, {1: ["unpatch"]}, {1: AGAIN}, {0: ["unpatch"], 1: ["patch"]}, {2: AGAIN}],
    ids=str,
)  # fmt: skip
def test_a_model_that_is_unpatched_in_a_forward(family: str, pad: int, place: str, plan: dict[int, list[str]]) -> None:
    """Sparse layers are not followed by dense ones, nor dense layers by sparse ones."""
    meddler, inputs = meddled(family, pad, place)
    plain = meddler.run({}, **inputs)
    patch_model(meddler.model, SPARSE)
    if plan == {0: ["unpatch"]}:  # no layer ran before
        torch.testing.assert_close(meddler.run(plan, **inputs), plain, atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(PatchError, match="patched or unpatched while a forward ran; run the forward again"):
            meddler.run(plan, **inputs)
    if hasattr(meddler.model, "sparse_patch"):
        unpatch_model(meddler.model)
    assert marks(meddler.model) == [] and torch.equal(meddler.run({}, **inputs), plain)


def test_what_generates_while_the_model_is_unpatched(plans: Path) -> None:
    """A ring without its patch is an error in one line; the unpatched model keeps working."""
    model = llama(layers=5)
    prompt = prompts([90])[0]
    plain = answer(model, prompt, 4)
    for name in ("streamingllm", "kinetics", "tidaldecode"):
        patch_model(model, configurations(plans)[name])
        found, unpatched = at_once([lambda: answer(model, prompt, 12), lambda: unpatch_model(model)])
        assert unpatched is model and isinstance(found, list | SparsePatchError), found
        assert answer(model, prompt, 4) == plain
