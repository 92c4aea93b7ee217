"""A model patched with the dense config computes what it computed before, to the last bit.

The dense config puts the hook in place and sends every call to the implementation the model had before. The kernels
and their inputs are then the same, so the comparison is `torch.equal`; TOLERANCES lists the exception and its reason.
Logits are compared, not only tokens: an off-by-one in a mask moves the logits long before it moves an argmax.

Every scenario is run before patching, while patched and after unpatching, and the hook's calls are counted, so that a
patch that does nothing fails too.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, IMAGE_TOKEN, IMAGE_TOKENS, VOCAB, gpt_oss, llama, vlm
from torch import nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparse_patch import patch_model, patched, sparsity_report, unpatch_model
from sparse_patch.names import HOOK, is_hook

DENSE = {"prefill": {"method": "dense"}, "decode": {"method": "dense"}}
LENGTH = 48
PADDING = 20  # deep enough that three windows reach it from the last token
NEW_TOKENS = 6

Outputs = dict[str, torch.Tensor]
Scenario = Callable[[PreTrainedModel], Outputs]


# --- inputs and comparison -------------------------------------------------------------------------------------------


def prompt(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Token ids `[rows, length]`, always the same, without the padding and the image tokens."""
    return torch.randint(1, VOCAB - 4, (rows, length), generator=torch.Generator().manual_seed(7))


def padded_prompt(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask `[2, LENGTH]`; the second row has PADDING padding tokens on `side`."""
    ids, mask = prompt(), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, slice(PADDING) if side == "left" else slice(LENGTH - PADDING, None)] = 0
    return ids * mask, mask


def assert_same(got: Outputs, want: Outputs, tolerance: float = 0.0) -> None:
    """Equal names and shapes; equal bits, or numbers that are at most `tolerance` apart."""
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.shape == want[name].shape, name
        if not torch.equal(tensor, want[name]):
            apart = (tensor - want[name]).abs().max().item()
            assert apart <= tolerance, f"{name}: {apart} apart"


def logits(model: nn.Module, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def implementations(model: nn.Module) -> dict[str, str]:
    """The attention implementation that each module's config names."""
    modules = [(name, getattr(module, "config", None)) for name, module in model.named_modules()]
    return {name: config._attn_implementation for name, config in modules if hasattr(config, "_attn_implementation")}


def text_attention(model: nn.Module) -> list[nn.Module]:
    """The decoder layers' attention modules, in order; none of a vision tower."""
    layers = [(name, module) for name, module in model.named_modules() if name.split(".")[-2:-1] == ["layers"]]
    return [layer.self_attn for name, layer in layers if "vision" not in name]


@contextmanager
def counted_calls() -> Iterator[Counter[nn.Module]]:
    """Count, per attention module, the calls that Transformers dispatches to the hook, under any of its names."""
    calls: Counter[nn.Module] = Counter()
    hooks = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if is_hook(name)}

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls[module] += 1
        return hooks[module.config._attn_implementation](module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.update(dict.fromkeys(hooks, spy))
    try:
        yield calls
    finally:
        for name in hooks:
            del ALL_ATTENTION_FUNCTIONS[name]  # only the override; the registered function stays


def assert_reported(model: nn.Module, calls: Counter[nn.Module]) -> None:
    """The hook was reached by every attention module that the report lists, and the report counts the calls."""
    reported = {model.get_submodule(layer.name): layer for layer in sparsity_report(model).layers}
    assert list(reported) == text_attention(model)
    assert calls == {module: layer.prefill.calls + layer.decode.calls for module, layer in reported.items()}
    assert not any(layer.prefill.sparse_calls + layer.decode.sparse_calls for layer in reported.values())


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and on a busy machine they wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- scenarios -------------------------------------------------------------------------------------------------------


def forward(model: PreTrainedModel) -> Outputs:
    return {"logits": logits(model, input_ids=prompt())}


def all_ones_mask(model: PreTrainedModel) -> Outputs:
    return {"logits": logits(model, input_ids=prompt(), attention_mask=torch.ones(2, LENGTH, dtype=torch.long))}


def padded_batch(model: PreTrainedModel, side: str) -> Outputs:
    """Padding positions are nobody's concern, but the same kernels see the same mask, so they agree as well."""
    ids, mask = padded_prompt(side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = logits(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    return {"valid positions": out[mask == 1], "padding positions": out[mask == 0]}


def generate(model: PreTrainedModel, side: str | None = None, **options: Any) -> Outputs:
    ids, mask = padded_prompt(side) if side else (prompt(), torch.ones(2, LENGTH, dtype=torch.long))
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, **options}
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    outputs = {"logits": torch.stack(out.logits), "tokens": out.sequences}
    return outputs | ({"scores": torch.stack(out.scores)} if out.scores else {})


def by_hand(model: PreTrainedModel, static: bool, pieces: list[int]) -> Outputs:
    """Feed the prompt in `pieces` through one cache: from the second piece on, q_start is what was cached before."""
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 5) if static else DynamicCache(config=model.config)
    steps = prompt(length=sum(pieces)).split(pieces, dim=1)
    out = [logits(model, input_ids=ids, past_key_values=cache, use_cache=True) for ids in steps]
    return {f"step {i}": step for i, step in enumerate(out)}


def packed(model: PreTrainedModel) -> Outputs:
    """Two documents in one row, told apart by nothing but positions that begin again."""
    positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
    return {"logits": logits(model, input_ids=prompt(rows=1), position_ids=positions, use_cache=False)}


def gradient_checkpointing(model: PreTrainedModel) -> Outputs:
    """Training mode, the loss and the gradient of every parameter."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # its newer name
    getattr(model.train(), f"{kind}_checkpointing_enable")()
    model.zero_grad()
    loss = model(input_ids=prompt(), labels=prompt(), use_cache=False).loss
    loss.backward()
    getattr(model.eval(), f"{kind}_checkpointing_disable")()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert any("self_attn" in name for name in gradients)
    return {"loss": loss.detach(), **gradients}


def attention_weights(model: PreTrainedModel) -> Outputs:
    """What `output_attentions=True` gives: the weights if the implementation is eager, else none of them."""
    with torch.no_grad():
        out = model(input_ids=prompt(), output_attentions=True)
    weights = {f"layer {i}": layer for i, layer in enumerate(out.attentions)}
    assert len(weights) in (0, model.config.num_hidden_layers)
    return {"logits": out.logits, **weights}


def eager_attention_weights(model: PreTrainedModel) -> Outputs:
    outputs = attention_weights(model)
    assert "layer 0" in outputs
    return outputs


def mask_4d(model: PreTrainedModel) -> Outputs:
    """A float mask that nobody would guess: a prefix that sees itself both ways, and a stretch of keys taken away."""
    keep = torch.ones(LENGTH, LENGTH).tril().bool()
    keep[:10, :10] = True
    keep[25:, 12:20] = False
    mask = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(~keep, torch.finfo(torch.float32).min)
    return {"logits": logits(model, input_ids=prompt(), attention_mask=mask)}


SCENARIOS: dict[str, Scenario] = {
    "forward": forward,
    "all-ones-mask": all_ones_mask,
    "left-padded": partial(padded_batch, side="left"),
    "right-padded": partial(padded_batch, side="right"),
    "generate": generate,
    "generate-left-padded": partial(generate, side="left"),
    "generate-static": partial(generate, cache_implementation="static"),
    "generate-static-left-padded": partial(generate, side="left", cache_implementation="static"),
    "chunked-prefill": partial(generate, prefill_chunk_size=16),
    "chunked-prefill-left-padded": partial(generate, side="left", prefill_chunk_size=16),
    "continued-chat": partial(by_hand, static=False, pieces=[28, 20, 1, 1]),
    "continued-chat-static": partial(by_hand, static=True, pieces=[28, 20, 1, 1]),
    "decode-static": partial(by_hand, static=True, pieces=[40, *[1] * 8]),
    "beam-search": partial(generate, side="left", num_beams=3, output_scores=True),
    "packed": packed,
    "gradient-checkpointing": gradient_checkpointing,
    "attention-weights": attention_weights,
    "attention-weights-eager": eager_attention_weights,  # with attn_implementation="eager"
    "mask-4d": mask_4d,
}


# Gemma 4 lets only the last query of a prompt through its KV-shared layers, except under the implementation *named*
# sdpa where a mask is left out. The hook has another name and lazy masks, so there these layers compute one row of the
# same attention instead of all rows, with another kernel: rounding, of logits of size 1.
TOLERANCES = {("gemma4", "generate-static"): 1e-5}


# --- the matrix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_dense_config_changes_nothing(family: str, scenario: str) -> None:
    model, run = {**FAMILIES, "gpt_oss": gpt_oss}[family](), SCENARIOS[scenario]
    if scenario == "attention-weights-eager":
        model.set_attn_implementation("eager")
    strings, before = implementations(model), run(model)

    patch_model(model, DENSE)
    with counted_calls() as calls:
        assert_same(run(model), before, TOLERANCES.get((family, scenario), 0.0))
    assert_reported(model, calls)

    unpatch_model(model)
    with counted_calls() as calls:
        assert_same(run(model), before)
    assert not calls
    assert implementations(model) == strings


def test_a_users_own_attention_function_finds_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation may read its module's config, as FlashAttention does; without a mask function it gets none."""

    def reads_config(module: nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        name, mask = module.config._attn_implementation, args[2]
        seen.append((name, module.layer_idx, module.training, mask, kwargs["scaling"]))
        return query.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "reads_config", reads_config)
    seen: list[tuple[Any, ...]] = []
    model = llama()
    model.set_attn_implementation("reads_config")
    before = SCENARIOS["left-padded"](model)
    want, seen = seen, []
    assert want == [("reads_config", layer, False, None, 0.25) for layer in range(3)]
    with patched(model, DENSE):
        assert_same(SCENARIOS["left-padded"](model), before)
    assert seen == want


# --- patching, unpatching, and what must not be touched --------------------------------------------------------------


def test_unpatching_restores_a_model_that_a_context_left_by_an_exception() -> None:
    model = llama()
    strings, before = implementations(model), forward(model)
    with pytest.raises(ZeroDivisionError), patched(model, DENSE):
        assert implementations(model) != strings
        1 / 0  # noqa: B018
    with counted_calls() as calls:
        assert_same(forward(model), before)
    assert not calls
    assert implementations(model) == strings


def two_models_from_one_config() -> tuple[PreTrainedModel, PreTrainedModel]:
    config = llama().config
    torch.manual_seed(1)
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    assert first.config is second.config, "Transformers copies the config by now: this test shows nothing"
    return first, second


def test_patching_a_model_leaves_another_of_the_same_config_alone() -> None:
    first, second = two_models_from_one_config()
    strings, before_first, before_second = implementations(second), generate(first), generate(second)

    patch_model(first, DENSE)
    with counted_calls() as calls:
        assert_same(generate(second), before_second)
        assert not calls
        assert_same(generate(first), before_first)
        assert set(calls) == set(text_attention(first))
    assert implementations(second) == strings

    unpatch_model(first)
    assert_same(generate(first), before_first)
    assert implementations(first) == strings
    assert implementations(second) == strings


def test_unpatching_a_model_leaves_another_of_the_same_config_patched() -> None:
    first, second = two_models_from_one_config()
    strings, before = implementations(second), forward(second)
    patch_model(first, DENSE)
    patch_model(second, DENSE)
    unpatch_model(first)
    with counted_calls() as calls:
        assert_same(forward(second), before)
        assert set(calls) == set(text_attention(second))
        forward(first)
        assert set(calls) == set(text_attention(second))
    unpatch_model(second)
    assert implementations(first) == implementations(second) == strings


def test_a_deep_copy_of_a_patched_model_is_unpatched_on_its_own() -> None:
    model = llama()
    strings, before = implementations(model), generate(model)
    patch_model(model, DENSE)
    clone = copy.deepcopy(model)
    with counted_calls() as calls:
        assert_same(generate(clone), before)
    assert set(calls) == set(text_attention(clone))

    unpatch_model(clone)
    assert implementations(clone) == strings
    with counted_calls() as calls:
        assert_same(generate(clone), before)
        assert not calls
        assert_same(generate(model), before)
        assert set(calls) == set(text_attention(model))

    unpatch_model(model)
    assert implementations(model) == strings


def test_a_saved_patched_model_reloads_unpatched(tmp_path: Path) -> None:
    model = llama()
    strings, before = implementations(model), forward(model)
    patch_model(model, DENSE)
    model.save_pretrained(tmp_path)
    assert not [file.name for file in tmp_path.glob("*.json") if HOOK in file.read_text()]

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert implementations(reloaded) == strings
    with counted_calls() as calls:
        assert_same(forward(reloaded), before)
    assert not calls
    assert implementations(model) != strings  # saving did not unpatch the model itself


# --- wrapped and multimodal models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_first", [True, False], ids=["patch-then-wrap", "wrap-then-patch"])
@pytest.mark.parametrize("through_wrapper", [True, False], ids=["unpatch-wrapper", "unpatch-base"])
def test_lora(patch_first: bool, through_wrapper: bool) -> None:
    peft = pytest.importorskip("peft")

    def wrap(model: PreTrainedModel) -> PreTrainedModel:
        torch.manual_seed(2)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config).eval()

    unpatched = wrap(llama())
    before = {name: SCENARIOS[name](unpatched) for name in ("forward", "left-padded", "generate")}
    assert not torch.equal(before["forward"]["logits"], forward(llama())["logits"]), "the adapter does nothing"

    base = llama()
    strings = implementations(base)
    if patch_first:
        patch_model(base, DENSE)
        model = wrap(base)
    else:
        model = wrap(base)
        patch_model(model, DENSE)
    for name, want in before.items():
        with counted_calls() as calls:
            assert_same(SCENARIOS[name](model), want)
        assert set(calls) == set(text_attention(base))
    assert len(sparsity_report(model).layers) == base.config.num_hidden_layers

    unpatch_model(model if through_wrapper else base)
    with counted_calls() as calls:
        assert_same(forward(model), before["forward"])
    assert not calls
    assert implementations(base) == strings
    assert set(implementations(model).values()) == set(strings.values())  # the wrapper has a config of its own


def image_prompt() -> dict[str, torch.Tensor]:
    """One image between two stretches of text."""
    ids = prompt(rows=1)
    ids[:, 14 : 14 + IMAGE_TOKENS] = IMAGE_TOKEN
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == IMAGE_TOKEN).long()}


def image_forward(model: PreTrainedModel) -> Outputs:
    return {"logits": logits(model, **image_prompt())}


def image_generate(model: PreTrainedModel, **options: Any) -> Outputs:
    options |= {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True}
    out = model.generate(**image_prompt(), return_dict_in_generate=True, **options)
    return {"logits": torch.stack(out.logits)}


IMAGE_SCENARIOS: dict[str, Scenario] = {
    "image-forward": image_forward,
    "image-generate": image_generate,
    "image-generate-static": partial(image_generate, cache_implementation="static"),
    "text-forward": forward,
    "text-left-padded": partial(padded_batch, side="left"),
}


@pytest.mark.parametrize("scenario", IMAGE_SCENARIOS)
def test_only_the_text_tower_of_a_vision_language_model_is_patched(scenario: str) -> None:
    model, run = vlm(), IMAGE_SCENARIOS[scenario]
    strings, before = implementations(model), run(model)
    vision = {name: string for name, string in strings.items() if "vision_tower" in name}
    assert vision

    patch_model(model, DENSE)
    assert {name: string for name, string in implementations(model).items() if name in vision} == vision
    assert model.config.vision_config._attn_implementation in vision.values()
    with counted_calls() as calls:
        assert_same(run(model), before)
    assert_reported(model, calls)
    assert len(calls) == model.config.text_config.num_hidden_layers

    unpatch_model(model)
    assert_same(run(model), before)
    assert implementations(model) == strings


def test_the_image_mask_matters() -> None:
    """Guards the test above: a causal mask instead of the image's bidirectional one moves the logits."""
    model, inputs = vlm(), image_prompt()
    causal = {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}
    assert not torch.allclose(logits(model, **inputs), logits(model, **causal), atol=0.1)
