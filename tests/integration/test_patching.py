"""Attaching and detaching: what is refused, and that a refused model is unchanged. See also test_dense_parity.py."""

import copy
import functools
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.model_state import marks
from families import FAMILIES
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel

from sparse_patch import (
    ConfigError,
    PatchError,
    capture_plans,
    load_config,
    patch_model,
    patched,
    reset_report,
    sparsity_report,
    unpatch_model,
)

FLEX = "flexprefill.yaml"
SPARSE = {"prefill": {"method": "flexprefill", "block_size": 16, "min_budget": 16, "gamma": 0.5, "min_length": 0}}


@pytest.fixture
def llama() -> PreTrainedModel:
    return FAMILIES["llama"]()


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 83)[None]).logits


def test_patch_and_unpatch_return_the_model_and_leave_nothing(llama: PreTrainedModel) -> None:
    before, keys = run(llama), set(llama.state_dict())
    assert patch_model(llama, SPARSE) is llama
    assert not torch.equal(run(llama), before) and set(llama.state_dict()) == keys
    assert unpatch_model(llama) is llama
    assert torch.equal(run(llama), before) and marks(llama) == []


def test_a_second_patch_says_to_unpatch_first(llama: PreTrainedModel) -> None:
    patch_model(llama, FLEX)
    for model in (llama, llama.model):
        with pytest.raises(PatchError, match="patched already; pass replace=True, or call unpatch_model first"):
            patch_model(model, "dense.yaml")
    assert sparsity_report(llama).source == FLEX
    unpatch_model(llama)
    patch_model(llama, "dense.yaml")
    assert sparsity_report(llama).source == "dense.yaml"


def test_a_part_of_a_model_can_be_patched_and_blocks_the_whole(llama: PreTrainedModel) -> None:
    patch_model(llama.model, SPARSE)
    assert len(sparsity_report(llama.model).layers) == 3
    with pytest.raises(PatchError, match="patched already"):
        patch_model(llama, SPARSE)
    unpatch_model(llama.model)
    assert marks(llama) == []


@pytest.mark.parametrize("function", [unpatch_model, sparsity_report, reset_report])
def test_an_unpatched_model_is_an_error(llama: PreTrainedModel, function: Any) -> None:
    with pytest.raises(PatchError, match="LlamaForCausalLM is not patched; call patch_model first"):
        function(llama)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "model", None], ids=["module", "str", "none"])
def test_things_that_are_no_transformers_model(thing: Any) -> None:
    with pytest.raises(PatchError, match="is not a Transformers model and holds none"):
        patch_model(thing, FLEX)


def test_an_encoder_is_refused() -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(PatchError, match="found no causal self-attention"):
        patch_model(BertModel(config), FLEX)


class RemoteAttention(nn.Module):
    """Attention as in remote code: its own arithmetic, no interface."""

    def __init__(self, native: nn.Module) -> None:
        super().__init__()
        self.config, self.layer_idx = native.config, native.layer_idx

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return hidden_states, None


def test_remote_code_is_refused_by_name_and_left_alone(llama: PreTrainedModel) -> None:
    llama.model.layers[1].self_attn = RemoteAttention(llama.model.layers[1].self_attn)
    before = run(llama)
    with pytest.raises(PatchError) as error:
        patch_model(llama, FLEX)
    message = str(error.value)
    assert "1 of 3 attention modules" in message and "model.layers.1.self_attn" in message
    assert "RemoteAttention" in message and "trust_remote_code" in message and "\n" not in message
    assert marks(llama) == [] and torch.equal(run(llama), before)


def test_another_live_patch_of_forward_is_refused(llama: PreTrainedModel) -> None:
    attention = llama.model.layers[2].self_attn
    attention.forward = types.MethodType(RemoteAttention.forward, attention)
    with pytest.raises(PatchError, match="undo the other patch of its forward"):
        patch_model(llama, FLEX)
    assert marks(llama) == []


def test_hooks_around_forward_are_no_patch(llama: PreTrainedModel) -> None:
    """accelerate wraps the forward of every module when it spreads a model over devices."""
    for layer in llama.model.layers:
        original = layer.self_attn.forward

        @functools.wraps(original)
        def hooked(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            return _original(*args, **kwargs)

        layer.self_attn.forward = hooked
    with patched(llama, SPARSE):
        run(llama)
        assert sparsity_report(llama).layers[0].prefill.sparse_calls == 1


def test_device_map_with_accelerate_hooks(llama: PreTrainedModel) -> None:
    from accelerate import dispatch_model

    before = run(llama)
    spread = dispatch_model(llama, {"": "cpu"}, main_device="cpu", force_hooks=True)
    with patched(spread, "dense.yaml"):
        assert torch.equal(run(spread), before)
        assert sparsity_report(spread).layers[0].prefill.calls == 1
    with patched(spread, SPARSE):
        run(spread)
        assert sparsity_report(spread).layers[0].prefill.sparse_calls == 1


@pytest.mark.parametrize("patch_first", [True, False])
def test_layers_on_disk(patch_first: bool, llama: PreTrainedModel, tmp_path: Path) -> None:
    """As `device_map="auto"` does if memory is short: hooks of accelerate move weights and tensors."""
    from accelerate import dispatch_model

    delta = {
        "method": "delta",
        "budget": 24,
        "page_size": 4,
        "recency_pages": 1,
        "min_length": 0,
        "roles": {"full": [0]},
    }
    config, ids = {**SPARSE, "decode": delta}, torch.arange(3, 83)[None]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
    options["return_dict_in_generate"] = True
    before = run(llama)
    with patched(llama, config):
        expected: Any = llama.generate(ids, **options)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
    if patch_first:
        patch_model(llama, config)
    spread = dispatch_model(llama, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    if not patch_first:
        patch_model(spread, config)
    found: Any = spread.generate(ids, **options)
    assert next(spread.model.layers[1].parameters()).device.type == "meta"
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert sparsity_report(spread).layers[2].decode.sparse_calls == 4
    unpatch_model(spread)
    assert torch.equal(run(spread), before) and marks(spread) == []


def test_a_layer_that_the_model_lacks_leaves_it_alone(llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="the model has no layer 7; it has 3 layers, 0 to 2"):
        patch_model(llama, FLEX, prefill={"layers": [7]})
    assert marks(llama) == []


def test_sources_and_overrides(llama: PreTrainedModel) -> None:
    ready = load_config(FLEX)
    for source, overrides in ((FLEX, {}), (ready, {}), (["flexprefill"], {}), (ready, {"backend": "torch"})):
        with patched(llama, source, **overrides):  # type: ignore[arg-type]
            assert sparsity_report(llama).config["prefill"]["gamma"] == 0.8
    with patched(llama, FLEX, prefill={"gamma": 0.9}):
        assert sparsity_report(llama).config["prefill"]["gamma"] == 0.9


def test_changes_to_the_config_survive_unpatching(llama: PreTrainedModel) -> None:
    with patched(llama, SPARSE):
        llama.resize_token_embeddings(120)
        llama.config.use_cache = False
    assert llama.config.vocab_size == 120 and llama.config.use_cache is False
    assert llama.config._attn_implementation == "sdpa"


def test_an_implementation_that_was_changed_meanwhile_shows_in_the_report(llama: PreTrainedModel) -> None:
    with patched(llama, SPARSE):
        assert sparsity_report(llama).hook_active
        llama.set_attn_implementation("sdpa")
        report = sparsity_report(llama)
        assert not report.hook_active and "hook is not active" in str(report)
    assert marks(llama) == []


def test_a_deep_copy_counts_for_itself(llama: PreTrainedModel) -> None:
    with patched(llama, SPARSE):
        twin = copy.deepcopy(llama)
        run(twin)
        assert sparsity_report(twin).layers[0].prefill.calls == 1
        assert sparsity_report(llama).layers[0].prefill.calls == 0


def test_captured_plans_are_those_that_ran(llama: PreTrainedModel) -> None:
    with patched(llama, SPARSE):
        with capture_plans(llama) as plans:
            run(llama)
        run(llama)
        assert sorted(plans) == [0, 1, 2] and all(len(calls) == 1 for calls in plans.values())
        phase, plan = plans[1][0]
        density = sparsity_report(llama).layers[1].prefill.density
        assert phase == "prefill" and plan.density().mean().item() == pytest.approx(density)  # type: ignore[union-attr]
