"""Rings that cannot serve, or that nobody expects: dense with the unpatched result, never an error afterwards.

`test_span_caches.py` and `test_span_generation.py` test what rings compute if they can serve.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import COMMON, llama
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from sparse_patch import patched, span_cache, sparsity_report
from sparse_patch.integration.caches.rings import RingLayer

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT, NEW = 60, 6
STREAMING = {"both": {"method": "streamingllm", "sink": 3, "window": 12}}
QUEST = {"decode": {"method": "quest", "page_size": 4, "budget": 16, "min_length": 0, "layers": "all"}}
FULL: dict[str, dict[str, Any]] = {
    "streamingllm": {"both": {"method": "streamingllm", "sink": 3, "window": 400}},
    "quest": {"decode": {**QUEST["decode"], "budget": 400}},
    "flexprefill": {"prefill": {"method": "flexprefill", "block_size": 16, "gamma": 1.0, "min_length": 0}},
}
Inputs = dict[str, torch.Tensor]
NOT_LEFT = "padding that is not on the left"


def ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(3, 90, (rows, PROMPT), generator=torch.Generator().manual_seed(1))


def masked(change: Callable[[torch.Tensor], None] = lambda mask: None) -> Inputs:
    """A padded batch, with something more in its mask."""
    mask = torch.ones(3, PROMPT, dtype=torch.long)
    mask[1, :13] = 0
    change(mask)
    return {"input_ids": ids(), "attention_mask": mask}


def _blank(mask: torch.Tensor) -> None:
    mask[2] = 0


def _right(mask: torch.Tensor) -> None:
    mask[0, -9:] = 0


def _hole(mask: torch.Tensor) -> None:
    mask[0, 20:29] = 0


def _every_second(mask: torch.Tensor) -> None:
    mask[0, ::2] = 0


def generated(model: Any, inputs: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their logits."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    result = model.generate(**inputs, **settings, **options)
    return result.sequences, torch.stack(result.logits)


def same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-4)


STATIC = {"cache_implementation": "static", "disable_compile": True}
CACHES = pytest.mark.parametrize("options", [{}, STATIC], ids=["growing", "static"])


@CACHES
@pytest.mark.parametrize("change", [_right, _hole, _every_second])
def test_masks_that_are_not_left_padding(change: Callable[[torch.Tensor], None], options: dict[str, Any]) -> None:
    """Every call of the text is dense and counted, as unpatched; a later text with a served mask is sparse."""
    model, inputs = llama(), masked(change)
    expected = generated(model, inputs, **options)
    for config in (STREAMING, QUEST):
        with patched(model, config, on_unsupported="silent"):
            same(generated(model, inputs, **options), expected)
            report = sparsity_report(model)
            calls = NEW if config is STREAMING else NEW - 1
            assert report.fallbacks() == {NOT_LEFT: 3 * calls}
            generated(model, masked(), **options)
            assert sparsity_report(model).layers[1].decode.sparse_calls == NEW - 1


@CACHES
@pytest.mark.parametrize("kind", FULL)
def test_a_blank_row(kind: str, options: dict[str, Any]) -> None:
    """The prompt is dense; a row that begins with the first new token is left-padded from then on."""
    model, inputs = llama(), masked(_blank)
    expected = generated(model, inputs, **options)
    with patched(model, FULL[kind], on_unsupported="silent"):
        same(generated(model, inputs, **options), expected)
    with patched(model, STREAMING, on_unsupported="silent"):
        _, logits = generated(model, inputs, **options)
        report = sparsity_report(model)
        torch.testing.assert_close(logits[0], expected[1][0], atol=1e-4, rtol=1e-4)
        assert report.fallbacks() == {NOT_LEFT: 3}
        assert report.layers[1].decode.sparse_calls == NEW - 1


@pytest.mark.parametrize("options", [{}, STATIC], ids=["growing", "static"])
def test_float64(options: dict[str, Any]) -> None:
    model = llama().double()
    expected = generated(model, masked(), **options)
    for config in (STREAMING, QUEST):
        with patched(model, config), pytest.warns(UserWarning, match="dtype torch.float64"):
            same(generated(model, masked(), **options), expected)
            assert set(sparsity_report(model).fallbacks()) == {"dtype torch.float64"}


def tuned(kind: type) -> nn.Module:
    """A model with virtual tokens before the prompt: embeddings and a mask, or keys in the cache."""
    model = get_peft_model(llama(), kind(task_type="CAUSAL_LM", num_virtual_tokens=7)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens(kind: type) -> None:
    """Without padding they are the first tokens of the text; before padding no sparse path serves them."""
    model, one_row = tuned(kind), {"input_ids": ids(1)}
    expected, padded = generated(model, one_row), generated(model, masked())
    for config in FULL.values():
        with patched(model, config, on_unsupported="silent"):
            same(generated(model, one_row), expected)
            assert sparsity_report(model).fallbacks() == {}
            same(generated(model, masked()), padded)
    for config in (STREAMING, QUEST):
        with patched(model, config, on_unsupported="silent"):
            assert not torch.equal(generated(model, one_row)[1], expected[1])
            assert sparsity_report(model).fallbacks() == {}
            same(generated(model, masked()), padded)
            assert set(sparsity_report(model).fallbacks()) == {NOT_LEFT}


def test_embeddings_and_a_mask_that_is_longer() -> None:
    """As in prompt tuning by hand: the mask counts tokens that `input_ids` do not have."""
    model = llama()
    embedded = model.get_input_embeddings()(ids(1)).detach()
    inputs = {"inputs_embeds": embedded, "attention_mask": torch.ones(1, PROMPT, dtype=torch.long)}
    with patched(model, STREAMING):
        _, logits = generated(model, {"input_ids": ids(1)})
        same((generated(model, inputs)[1],) * 2, (logits, logits))
        assert sparsity_report(model).fallbacks() == {}


# Models whose attention is called in other ways.


def _model(name: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).float().eval()


def diffllama() -> PreTrainedModel:
    """A layer attends twice, with the same keys and each time with half of the values' heads."""
    return _model("DiffLlama", **COMMON)


def jetmoe() -> PreTrainedModel:
    """For each KV head there are as many query heads as experts per token."""
    return _model("JetMoe", **COMMON, kv_channels=16, num_local_experts=4, num_experts_per_tok=2)


def gpt_neox() -> PreTrainedModel:
    """The cache is called `layer_past`."""
    settings = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
    return _model("GPTNeoX", **settings, rotary_pct=0.5)


def gpt_bigcode(multi_query: bool = True) -> PreTrainedModel:
    """The cache is called `layer_past`; there is one KV head, or as many as query heads."""
    shape = {"n_positions": 256, "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 96, "multi_query": multi_query}
    return _model("GPTBigCode", **shape, initializer_range=0.2, eos_token_id=None, bos_token_id=1, pad_token_id=0)


def gpt_bigcode_of_many_heads() -> PreTrainedModel:
    return gpt_bigcode(multi_query=False)


MODELS = pytest.mark.parametrize("build", [diffllama, jetmoe, gpt_neox, gpt_bigcode, gpt_bigcode_of_many_heads])


@CACHES
@MODELS
def test_other_models_with_full_budgets(build: Callable[[], PreTrainedModel], options: dict[str, Any]) -> None:
    model = build()
    expected = generated(model, masked(), **options)
    for config in FULL.values():
        with patched(model, config, on_unsupported="error"):
            same(generated(model, masked(), **options), expected)


@MODELS
def test_other_models_read_what_a_whole_cache_gives(build: Callable[[], PreTrainedModel]) -> None:
    """Rings, and pages with kept statistics, give what a cache that keeps everything, and only that, gives."""
    model = build()
    dense = generated(model, masked())
    for config in (STREAMING, QUEST):
        with patched(model, config, on_unsupported="error"):
            expected = generated(model, masked(), past_key_values=DynamicCache(config=model.config))
            assert not torch.allclose(expected[1], dense[1], atol=1e-3), "something was left out"
            same(generated(model, masked()), expected)
            same(generated(model, masked(), **STATIC), expected)
            report = sparsity_report(model)
        copying = report.layers[1].decode.copying_calls
        calls = report.layers[1].decode.calls
        assert copying == (calls // 3 if config is QUEST else 0), "statistics are made anew on a user's cache only"


@torch.no_grad()
@pytest.mark.parametrize(
    "build, has", [(llama, True), (gpt_neox, True), (gpt_bigcode, True), (diffllama, False), (jetmoe, False)]
)
def test_what_has_rings(build: Callable[[], PreTrainedModel], has: bool) -> None:
    """A layer gives up its ring if it attends twice, or attends to keys that it computes from those that it caches."""
    model = build()
    with patched(model, STREAMING):
        cache = span_cache(model, 100)
        model(ids(), past_key_values=cache)
        assert {isinstance(layer, RingLayer) for layer in cache.layers} == {has}
        model(ids()[:, :1], past_key_values=cache)
        layer = sparsity_report(model).layers[1].decode
    assert cache.get_seq_length() == PROMPT + 1 and layer.sparse_calls == layer.calls
    assert layer.keeping_calls == (0 if has else layer.calls), "the report says that all keys are kept"
