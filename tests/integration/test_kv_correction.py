"""KV-cache correction: after it the cache is what dense decode would have left."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import COMMON, WINDOW, llama, qwen3_next
from transformers import DynamicCache, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from sparse_patch.integration.caches.making import growing_cache
from sparse_patch.integration.patch import is_patched
from sparse_patch.integration.patching import patched
from sparse_patch.integration.reporting import sparsity_report
from sparse_patch.ops.attention import page_decode

PROMPT = 60
SPARSE = {"method": "tidaldecode", "budget": 12, "min_length": 0, "roles": {"full": [], "select": [0]}}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return llama()


def keys_after(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: Any, steps: int) -> torch.Tensor:
    """Keys of the last layer after a prompt and single tokens, without padding."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # as `generate` counts them
    with torch.no_grad():
        for begin, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + steps))]:
            model(
                input_ids=ids[:, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
            )
    return cache.layers[-1].keys * mask[:, None, : PROMPT + steps, None]


@pytest.mark.parametrize("pad", [0, 9])
@pytest.mark.parametrize("period", [5, 20])
def test_a_corrected_cache_is_the_dense_one(model: PreTrainedModel, period: int, pad: int) -> None:
    ids = torch.randint(3, 90, (2, PROMPT + 41), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    prefill = {"method": "a_shape", "block_size": 16, "sink": 16, "window": 16, "min_length": 16}
    for steps in (period, period + 1, 2 * period + 1):
        expected = keys_after(model, ids, mask, DynamicCache(config=model.config), steps)
        with patched(model, {"decode": SPARSE}):
            uncorrected = keys_after(model, ids, mask, growing_cache(model.config), steps)
        with patched(model, {"decode": {**SPARSE, "correction_period": period}}):
            found = keys_after(model, ids, mask, growing_cache(model.config), steps)
        corrected = PROMPT + (steps - 1) // period * period
        assert (uncorrected - expected)[:, :, PROMPT:-1].abs().max() > 1e-3, "sparse decode leaves its mark"
        torch.testing.assert_close(found[:, :, :corrected], expected[:, :, :corrected], atol=1e-4, rtol=1e-4)
    # a sparse prefill method does not take part in the correction
    with patched(model, {"prefill": prefill, "decode": {**SPARSE, "correction_period": 20}}):
        keys_after(model, ids, mask, growing_cache(model.config), 21)
        assert sparsity_report(model).layers[1].prefill.sparse_calls == 1


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("cut", [1, 2, 7])
def test_tokens_that_were_cut_off_are_not_read_again(model: PreTrainedModel, cut: int, period: int) -> None:
    """The cut is in the tokens since the last correction, before it, or in the prompt; other tokens come after."""
    ids = torch.randint(3, 90, (2, PROMPT + 12), generator=torch.Generator().manual_seed(1))
    mask, begin = torch.ones_like(ids), PROMPT + 4 - cut
    other = torch.cat([ids[:, :begin], torch.randint(3, 90, (2, PROMPT + 12 - begin))], 1)
    dense, cache = DynamicCache(config=model.config), growing_cache(model.config)
    expected = keys_after(model, other, mask, dense, 12)
    with patched(model, {"decode": {**SPARSE, "correction_period": period}}), torch.no_grad():
        keys_after(model, ids, mask, cache, 4)
        cache.crop(-cut)
        for i in range(begin, PROMPT + 12):
            model(input_ids=other[:, i : i + 1], past_key_values=cache)
    found = cache.layers[-1].keys
    assert found.shape == expected.shape
    torch.testing.assert_close(found[:, :, :-period], expected[:, :, :-period], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("period", [2, 20])
def test_corrections_run_on_our_own_kernel_where_it_runs(
    model: PreTrainedModel, period: int, prefill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of more tokens than decode has queries, and beside a method for prompts."""
    monkeypatch.setattr(page_decode, "fastest", lambda call, plan: "triton")
    ids = torch.randint(3, 90, (2, PROMPT + period + 1), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    expected = keys_after(model, ids, mask, DynamicCache(config=model.config), period + 1)
    config: dict[str, Any] = {"decode": {**SPARSE, "correction_period": period}}
    if prefill:
        config["prefill"] = {"method": "a_shape", "block_size": 16, "sink": 16, "window": 16, "min_length": 4096}
    with patched(model, config):
        found = keys_after(model, ids, mask, growing_cache(model.config), period + 1)
        layers = sparsity_report(model).layers
    kernels = [{**layer.prefill.dense_kernels, **layer.decode.dense_kernels} for layer in layers]
    assert kernels == [{"page_decode": 1}] * len(layers)
    torch.testing.assert_close(found[:, :, :-1], expected[:, :, :-1], atol=1e-4, rtol=1e-4)


def some_windows() -> PreTrainedModel:
    """A model whose middle layer has a window."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen2Config(**COMMON, layer_types=kinds, use_sliding_window=True, sliding_window=WINDOW)
    return Qwen2ForCausalLM(config).eval()


@pytest.mark.parametrize("build", [some_windows, qwen3_next])
def test_caches_that_cannot_be_cut_are_not_corrected(build: Callable[[], PreTrainedModel]) -> None:
    """A warning says so; the answer is the one without correction."""
    model = build()
    batch: dict[str, Any] = {"input_ids": torch.randint(3, 90, (1, PROMPT)), "do_sample": False, "max_new_tokens": 6}
    sparse: dict[str, Any] = {**SPARSE, "roles": {"full": [], "select": [int(build is qwen3_next)]}}
    with patched(model, {"decode": sparse}):
        expected = model.generate(**batch)
    with (
        patched(model, {"decode": {**sparse, "correction_period": 2}}),
        pytest.warns(UserWarning, match="not corrected"),
    ):
        assert torch.equal(model.generate(**batch), expected)


def test_generate_with_correction(model: PreTrainedModel) -> None:
    """Correcting after every token leaves only the last token's error; beams and a second prompt keep working."""
    batch: dict[str, Any] = {"input_ids": torch.randint(3, 90, (1, PROMPT)), "do_sample": False, "max_new_tokens": 9}
    with patched(model, {"decode": {**SPARSE, "correction_period": 3}}):
        assert model.generate(**batch).shape == (1, PROMPT + 9)
        assert model.generate(**batch, num_beams=3).shape == (1, PROMPT + 9)
        assert model.generate(**batch, cache_implementation="static").shape == (1, PROMPT + 9)
    assert not is_patched(model) and not model._forward_pre_hooks
