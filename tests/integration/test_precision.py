"""Mixed precision: under autocast, sparse calls compute as on tensors of that dtype, with sums in float32."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from bound import bound
from families import FAMILIES, llama
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from method_table import configurations
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from sparse_patch import growing_cache, patched, span_cache, sparsity_report
from sparse_patch.call import AttentionCall
from sparse_patch.evaluation.lm_eval import SparseLM
from sparse_patch.integration import hook as attention
from sparse_patch.integration.caches.making import adopt
from sparse_patch.integration.caches.rings import RingLayer
from sparse_patch.integration.generation_cache import spans_of
from sparse_patch.kernels.autocast import as_autocast
from sparse_patch.ops.attention import table

pytestmark = pytest.mark.usefixtures("one_thread")
VARIANTS = ("tidaldecode-kv_group", "tidaldecode-all", "quest-kv_group-sum-forced")  # sum what others of them sum
NAMES = [name for name in configurations(Path()) if name not in VARIANTS]
HALF = ("flexprefill-coverage", "kinetics")
CASES = pytest.mark.parametrize(
    "name, dtype", [*((name, torch.bfloat16) for name in NAMES), *((name, torch.float16) for name in HALF)], ids=str
)


def autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=dtype)


def batch(length: int = 290) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: PreTrainedModel, **options: Any) -> torch.Tensor:
    """The logits of a prompt's last token and of three generated tokens."""
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**batch(), **settings, **options).logits)  # type: ignore[operator]


@CASES
def test_full_budgets_give_what_the_unpatched_model_gives(
    name: str, dtype: torch.dtype, plans: Path, five_layers: PreTrainedModel
) -> None:
    full = configurations(plans, full=True)[name]
    with autocast(dtype):
        expected = logits(five_layers)
        with patched(five_layers, full, on_unsupported="error"):
            cache = DynamicCache(config=five_layers.config)  # a ring adds up in another order
            assert torch.equal(logits(five_layers, past_key_values=cache), expected)


Ran = tuple[AttentionCall, Any, torch.Tensor, Any]  # a call, its plan, its output and the method


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Ran]]:
    """The calls that run sparsely."""
    found: list[Ran] = []
    attend = attention._attend_sparsely

    def recorded(request: Any, call: AttentionCall, plan: Any) -> torch.Tensor:
        output = attend(request, call, plan)
        found.append((call, plan, output.transpose(1, 2), request.state.methods[call.phase]))
        return output

    monkeypatch.setattr(attention, "_attend_sparsely", recorded)
    yield found


@CASES
def test_autocast_rounds_nothing(
    name: str, dtype: torch.dtype, plans: Path, five_layers: PreTrainedModel, ran: list[Ran]
) -> None:
    """Plans and outputs are those of the same tensors without autocast; these are close to those of float32 sums."""
    cache = DynamicCache(config=five_layers.config)  # keeps everything, so that spans are a plan in decode too
    with patched(five_layers, configurations(plans)[name], on_unsupported="error"), autocast(dtype):
        assert logits(five_layers, past_key_values=cache).isfinite().all()
    assert len(ran) >= 3, "nothing was sparse"
    for call, plan, output, method in ran:
        assert call.q.dtype == call.k.dtype == call.v.dtype == output.dtype == dtype
        again, *_ = table.attend(call, plan)
        assert torch.equal(again, output)
        exact = replace(call, q=call.q.float(), k=call.k.float(), v=call.v.float())
        expected, *_ = table.attend(exact, plan, "reference")
        precision = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
        size = call.v.float().abs().max().item()
        # one rounding of the output, and one of probabilities that are multiplied in the dtype of the values
        torch.testing.assert_close(output.float(), expected, atol=2 * precision * size, rtol=2 * precision)
        if call.phase == "prefill":
            assert_same_plan(bound(method).plan(call), plan)


def assert_same_plan(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for field in fields(expected):
        value = getattr(expected, field.name)
        assert torch.equal(getattr(found, field.name), value) if torch.is_tensor(value) else True, field.name


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "minicpm3"])
def test_families_under_autocast(family: str, ran: list[Ran]) -> None:
    """Soft caps, norms of queries and keys, and values of another width."""
    model = FAMILIES[family]()
    ids = torch.randint(3, 90, (1, 150))
    flex = {"method": "flexprefill", "block_size": 16, "min_budget": 16, "gamma": 0.5, "min_length": 0}
    with autocast(torch.bfloat16), torch.no_grad():
        expected = model(ids).logits
        with patched(model, {"prefill": {**flex, "gamma": 1.0}}, on_unsupported="error"):
            assert torch.equal(model(ids).logits, expected)
        with patched(model, {"prefill": flex}, on_unsupported="error"):
            model(ids)
    assert ran and all(call.v.dtype == torch.bfloat16 for call, *_ in ran)


def test_what_autocast_leaves_as_it_is() -> None:
    x, wide = torch.randn(3), torch.randn(3, dtype=torch.float64)
    assert as_autocast(x)[0] is x
    with autocast(torch.bfloat16):
        assert [tensor.dtype for tensor in as_autocast(x, wide)] == [torch.bfloat16, torch.float64]
        with torch.autocast("cpu", enabled=False):
            assert as_autocast(x)[0] is x


def test_a_cache_is_filled_under_autocast_and_used_outside(five_layers: PreTrainedModel) -> None:
    """A growing cache takes what comes, as a `DynamicCache` does."""
    quest = {"decode": {"method": "quest", "min_length": 0, "budget": 400, "layers": "all"}}
    ids = batch()["input_ids"]
    answers = []
    for config in ({"both": {"method": "dense"}}, quest):
        with patched(five_layers, config):
            with autocast(torch.bfloat16):
                first = five_layers.generate(ids, max_new_tokens=3, return_dict_in_generate=True, do_sample=False)
            more = {"past_key_values": first.past_key_values, "max_new_tokens": 3, "do_sample": False}
            answers.append(five_layers.generate(first.sequences, **more))
    assert torch.equal(*answers)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("pattern", ["all", "none after the first", "all but the first", "in turn"])
@torch.no_grad()
def test_a_ring_serves_on_both_sides_of_autocast(pattern: str, static: bool, five_layers: PreTrainedModel) -> None:
    """The ring is about as close to the float32 answer as a cache that keeps everything, or closer."""
    pieces = batch()["input_ids"].split([280, 4, 1, 1, 4], 1)
    with_autocast = {
        "all": [True] * 5,
        "none after the first": [True, *[False] * 4],
        "all but the first": [False, *[True] * 4],
        "in turn": [True, False, True, False, True],
    }[pattern]

    def steps(cache: Cache, enabled: list[bool]) -> torch.Tensor:
        found = []
        for part, inside in zip(pieces, enabled, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                found.append(five_layers(part, past_key_values=cache).logits[:, -1].float())
        return torch.stack(found)

    with patched(five_layers, {"decode": {"method": "streamingllm", "sink": 4, "window": 60}}, on_unsupported="error"):
        ring: Cache = span_cache(five_layers, 300)
        if static:
            ring = StaticCache(config=five_layers.config, max_cache_len=300)
            adopt(ring, spans_of(five_layers))
        keeping, exact = growing_cache(five_layers.config), growing_cache(five_layers.config)
        found, expected = steps(ring, with_autocast), steps(keeping, with_autocast)
        right = steps(exact, [False] * 5)
    assert all(isinstance(layer, RingLayer) for layer in ring.layers)
    error, usual = ((logits - right).square().mean().sqrt() for logits in (found, expected))
    assert error <= 1.2 * usual < 0.1 * right.std()


# Who else turns autocast on.


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["flexprefill-coverage", "quest-kv_group-max-added", "streamingllm"])
@pytest.mark.parametrize("patch_first", [True, False])
def test_a_model_that_accelerate_prepares(name: str, patch_first: bool, plans: Path, accelerator: Accelerator) -> None:
    config = {**configurations(plans)[name], "on_unsupported": "error"}
    reference, model = llama(layers=5), llama(layers=5)
    with autocast(torch.bfloat16), patched(reference, config):
        expected = logits(reference)
    if patch_first:
        with patched(model, config):
            prepared = accelerator.prepare_model(model, evaluation_mode=True)
            found, report = logits(prepared), sparsity_report(prepared)
    else:
        prepared = accelerator.prepare_model(model, evaluation_mode=True)
        with patched(prepared, config):
            found, report = logits(prepared), sparsity_report(prepared)
    assert torch.equal(found, expected.float())
    assert sum(layer.prefill.sparse_calls + layer.decode.sparse_calls for layer in report.layers) > 0


@pytest.mark.parametrize("name", ["flexprefill-coverage", "quest-kv_group-max-added", "streamingllm"])
def test_the_mixed_precision_of_lm_eval(name: str, needle_llama_path: Path) -> None:
    """With full budgets the answers are those of the stock `hf` model."""
    full = {
        "flexprefill-coverage": {"prefill": {"method": "flexprefill", "min_length": 0, "gamma": 1.0}},
        "quest-kv_group-max-added": {"decode": {"method": "quest", "min_length": 0, "budget": 4096}},
        "streamingllm": {"both": {"method": "streamingllm", "window": 4000}},
    }[name]
    options: dict[str, Any] = {"batch_size": 2, "mixed_precision_dtype": "bfloat16", "dtype": "float32"}
    make: list[Callable[[], Any]] = [
        partial(HFLM, pretrained=str(needle_llama_path), device="cpu", **options),
        partial(SparseLM, str(needle_llama_path), full, **options),
    ]
    text = "The grass is green. One of the special magic numbers is 1234567. What is the number? The number is"
    likelihoods = [Instance("loglikelihood", {}, (text, answer), 0) for answer in (" 1234567", " 42")]
    generation = [Instance("generate_until", {}, (text, {"until": ["."], "max_gen_toks": 6}), 0)]
    stock, ours = ((lm.loglikelihood(likelihoods), lm.generate_until(generation)) for lm in (one() for one in make))
    assert ours[1] == stock[1]
    for (found, greedy), (expected, expected_greedy) in zip(ours[0], stock[0], strict=True):
        assert greedy == expected_greedy and found == pytest.approx(expected, abs=0.05)
