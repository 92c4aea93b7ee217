"""What is found in a model and what is refused: for the true reason, in one line, and the model stays unchanged."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from families import llama
from tiny_models import tiny_models
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from sparse_patch import PatchError, patch_model, patched, sparsity_report, unpatch_model
from sparse_patch.integration.discovery import attention_modules

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(name: str) -> PreTrainedModel:
    """The first tiny model of a class that can be made; skips if Transformers has no such class."""
    if not hasattr(transformers, name):
        pytest.skip(f"this Transformers has no {name}")
    for build in tiny_models(name):
        try:
            return build()
        except Exception as error:  # the class does not take this shape
            reason = error
    raise AssertionError(f"{name}: {reason}")


def refusal(model: PreTrainedModel) -> str:
    """Why a model is refused. Checks that the model is unchanged."""
    configs = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
    names = {name: config._attn_implementation for name, config in configs.items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(PatchError) as error:
        patch_model(model, "dense.yaml")
    message = str(error.value)
    assert type(model).__name__ in message and "\n" not in message and len(message) <= 500
    assert all(model.get_submodule(name).config is config for name, config in configs.items())
    assert {name: config._attn_implementation for name, config in configs.items()} == names
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    return message


def with_attention(change: Callable[[nn.Module], None], layers: tuple[int, ...] = (0, 1, 2)) -> PreTrainedModel:
    """A Llama whose attention modules were changed."""
    model = llama()
    for layer in layers:
        change(model.model.layers[layer].self_attn)
    return model


def of_class(kind: type) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        module.__class__ = kind

    return change


# --- found by what it does -------------------------------------------------------------------------------------------


class Mixer(LlamaAttention):
    """Attention under another name."""


@pytest.mark.parametrize(
    "name, layers", [("LongcatFlashForCausalLM", 6), ("DogeForCausalLM", 3), ("BartForCausalLM", 3)]
)
def test_attention_is_what_asks_the_interface(name: str, layers: int) -> None:
    """Models with two attention modules per decoder layer, without `is_causal`, and with cross-attention."""
    found = attention_modules(tiny(name))
    assert [module.layer_idx for module in found.values()] == list(range(layers))


def test_a_name_is_not_needed() -> None:
    model = with_attention(of_class(Mixer))
    with patched(model, "dense.yaml"), torch.no_grad():
        model(torch.arange(3, 43)[None])
        assert [layer.prefill.calls for layer in sparsity_report(model).layers] == [1, 1, 1]


def test_what_has_no_layer_beside_others_is_left_alone() -> None:
    model = llama()
    model.pooling = LlamaAttention(model.config, None)
    assert list(attention_modules(model)) == [f"model.layers.{i}.self_attn" for i in range(3)]


# --- not reached -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, attention",
    [
        ("BloomForCausalLM", "BloomAttention"),  # a layer and no config
        ("GPTNeoForCausalLM", "GPTNeoSelfAttention"),  # a config and no layer
        ("OpenAIGPTLMHeadModel", "Attention"),  # neither
        ("FalconForCausalLM", "FalconAttention"),  # both
        ("GitForCausalLM", "GitSelfAttention"),  # beside a tower that asks
        ("RwkvForCausalLM", "RwkvSelfAttention"),
    ],
)
def test_attention_of_its_own_is_named(name: str, attention: str) -> None:
    message = refusal(tiny(name))
    assert "attention modules do not ask Transformers' attention interface" in message and f".{attention})" in message
    assert message.endswith("it attends by code of its own, which cannot be patched")


@pytest.mark.parametrize("name", ["MambaForCausalLM", "xLSTMForCausalLM"])
def test_models_without_attention(name: str) -> None:
    assert "has no attention: no module asks" in refusal(tiny(name))


def attend_otherwise(self: nn.Module, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return hidden_states, None


def test_a_patch_of_a_forward_is_to_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch is on the module, and on its class."""
    message = refusal(with_attention(lambda it: setattr(it, "forward", types.MethodType(attend_otherwise, it)), (1,)))
    assert "1 of 3" in message and "undo the other patch of its forward" in message
    monkeypatch.setattr(LlamaAttention, "forward", attend_otherwise)
    message = refusal(llama())
    assert "3 of 3" in message and "undo the other patch of its forward" in message


# --- not causal self-attention of a decoder --------------------------------------------------------------------------


def test_attention_that_says_it_is_not_causal() -> None:
    message = refusal(with_attention(lambda it: setattr(it, "is_causal", False)))
    assert message.endswith(
        "found no causal self-attention: LlamaAttention says that it is not causal (is_causal is False)"
    )
    assert "BigBirdPegasusDecoderAttention says that it is not causal" in refusal(tiny("BigBirdPegasusForCausalLM"))


def test_only_what_is_no_decoder_is_told_so() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "d_model": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    of_bart = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = transformers.BartConfig(**sizes, **of_bart, encoder_ffn_dim=32, decoder_ffn_dim=32)
    bert = transformers.BertConfig(**sizes, intermediate_size=32)
    for model in (transformers.BartModel(bart), transformers.BartForConditionalGeneration(bart)):
        assert refusal(model).endswith("has an encoder; sparse_patch needs a decoder-only model")
    found = refusal(transformers.BertModel(bert))
    assert found.endswith("(BertSelfAttention is not); sparse_patch needs a decoder-only model")


def test_attention_with_another_config() -> None:
    other = type(llama().config)()
    message = refusal(with_attention(lambda it: setattr(it, "config", other)))
    assert message.endswith("found no attention of its decoder: LlamaAttention has another config than LlamaConfig")


# --- one module for several layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, layer", [("ZambaForCausalLM", "None"), ("Zamba2ForCausalLM", "-1")])
def test_blocks_that_several_layers_share(name: str, layer: str) -> None:
    assert f"does not say which layer it is of (layer_idx is {layer})" in refusal(tiny(name))


def test_layers_that_are_run_in_cycles() -> None:
    message = refusal(tiny("HrmTextForCausalLM"))
    assert "model.L_module.layers.0.self_attn and model.H_module.layers.0.self_attn are both of layer 0" in message
    message = refusal(with_attention(lambda it: setattr(it, "layer_idx", 2), (1,)))
    assert "model.layers.1.self_attn and model.layers.2.self_attn are both of layer 2" in message


# --- what a patch would change ---------------------------------------------------------------------------------------


class ByName(LlamaAttention):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        selects = self.config._attn_implementation in ("eager", "sdpa")
        return function(self, *args, selects=selects, **kwargs)


class ByNameInAHelper(LlamaAttention):
    forward = LlamaAttention.forward

    def selection(self) -> Any:
        return [name for name in [self.config._attn_implementation] if name == "sdpa"]


class ForATensor(LlamaAttention):
    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        if isinstance(attention_mask, torch.Tensor) and attention_mask.shape[-1] < hidden_states.shape[-2]:
            attention_mask = torch.nn.functional.pad(attention_mask, (0, 1))
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        return function(self, hidden_states, attention_mask=attention_mask, **kwargs)


class OfOtherThings(LlamaAttention):
    """Names sdpa, and asks what its hidden states are and whether there is a mask: nothing that a patch changes."""

    def __init__(self) -> None:
        self.name = "sdpa"

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Attend as eager or sdpa."""
        if isinstance(hidden_states, torch.Tensor) and attention_mask is not None:
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)(self, **kwargs)


@pytest.mark.parametrize("kind", [ByName, ByNameInAHelper])
def test_attention_that_computes_by_the_name_of_its_implementation(kind: type) -> None:
    message = refusal(with_attention(of_class(kind), (2,)))
    assert f"{kind.__name__} computes by the name of its attention implementation, which a patch changes" in message


def test_attention_that_asks_whether_its_mask_is_a_tensor() -> None:
    assert "ForATensor changes its mask only if that is a tensor" in refusal(with_attention(of_class(ForATensor), (1,)))


def test_attention_that_asks_other_things_is_patched() -> None:
    assert len(attention_modules(with_attention(of_class(OfOtherThings)))) == 3


@pytest.mark.parametrize("name", ["AXK2", "DeepseekV32", "DeepseekV4", "Dots3Note", "GlmMoeDsa", "HYV4", "MiniMaxM3VL"])
def test_models_that_select_their_own_keys(name: str) -> None:
    message = refusal(tiny(f"{name}ForCausalLM"))
    assert "cannot be patched, run it as it is: " in message and "patch_model" not in message


def test_gpt2_asks_for_what_is_mostly_switched_off() -> None:
    model = tiny("GPT2LMHeadModel")
    unpatch_model(patch_model(model, "dense.yaml"))
    for block in model.transformer.h:
        block.attn.reorder_and_upcast_attn = True
    assert "GPT2Attention computes by the name" in refusal(model)
