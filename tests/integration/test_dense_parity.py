"""A model patched with the dense config computes what it computed before, to the last bit.

The dense config puts the hook in place and sends every call to the implementation that the model had before. The
kernels and their inputs are then the same, so the comparison is `torch.equal`; TOLERANCES lists the exception and its
reason. Logits are compared, not only tokens, because an off-by-one in a mask moves the logits long before an argmax.

Every scenario runs before patching, while patched and after unpatching. The hook's calls are counted, so a patch that
does nothing fails too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from builders.scenarios import (
    DENSE,
    NEW_TOKENS,
    SCENARIOS,
    TOLERANCES,
    Outputs,
    Scenario,
    assert_reported,
    assert_same,
    counted_calls,
    forward,
    implementations,
    logits,
    padded_batch,
    prompt,
    text_attention,
)
from families import FAMILIES, IMAGE_TOKEN, IMAGE_TOKENS, gpt_oss, llama, vlm
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from sparse_patch import patch_model, patched, sparsity_report, unpatch_model

pytestmark = pytest.mark.usefixtures("one_thread")  # models this small gain nothing from threads


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
    """An implementation may read its module's config, as FlashAttention does. Without a mask function it gets none."""

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
    """Guards the test above: with a causal mask instead of the image's bidirectional one, the logits differ."""
    model, inputs = vlm(), image_prompt()
    causal = {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}
    assert not torch.allclose(logits(model, **inputs), logits(model, **causal), atol=0.1)
