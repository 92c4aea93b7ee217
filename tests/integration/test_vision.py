"""In a vision-language model the text tower is patched; the image tower is not touched, to the last bit."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import gemma4_vlm, image_inputs, mllama, qwen2_5_vl, qwen3_5_vl, qwen3_vl, vlm
from torch import nn
from transformers import PreTrainedModel

from sparse_patch import patch_model, sparsity_report, unpatch_model

CONFIG = {
    "prefill": {"method": "a_shape", "block_size": 16, "min_length": 0, "sink": 20, "window": 50},
    "decode": {"method": "quest", "budget": 48, "page_size": 8, "min_length": 0},
    "on_unsupported": "silent",  # Gemma 3's images see each other both ways
}
TOWERS: dict[Callable[[], PreTrainedModel], str] = {
    vlm: "model.vision_tower",
    gemma4_vlm: "model.vision_tower",
    qwen2_5_vl: "model.visual",
    qwen3_vl: "model.visual",
    qwen3_5_vl: "model.visual",
    mllama: "model.vision_model",
}
LENGTH, NEW = 120, 3


def state(module: nn.Module) -> dict[str, Any]:
    """Everything that a patch could change in a module and its submodules."""
    return {
        name: (
            type(part),
            sorted(vars(part)),
            part.forward.__func__ is type(part).forward,  # type: ignore[attr-defined]
            [len(hooks) for hooks in (part._forward_hooks, part._forward_pre_hooks)],
            getattr(getattr(part, "config", None), "_attn_implementation", None),
        )
        for name, part in module.named_modules()
    }


def hashes(model: PreTrainedModel, tower: str, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, str], torch.Tensor]:
    """A hash of the output of each module of the tower when the whole model reads an image, and the model's logits."""
    found: dict[str, str] = {}

    def keep(name: str, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
        if torch.is_tensor(tensor):
            found[name] = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()

    parts = model.get_submodule(tower).named_modules()
    hooks = [part.register_forward_hook(lambda _, __, out, name=name: keep(name, out)) for name, part in parts]
    mask = torch.ones_like(inputs["input_ids"])
    settings: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    result: Any = model.generate(**inputs, attention_mask=mask, max_new_tokens=NEW, **settings)  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    return found, torch.stack(result.logits)


@pytest.mark.parametrize("build", TOWERS, ids=lambda build: build.__name__)
def test_the_image_tower_is_untouched(build: Callable[[], PreTrainedModel]) -> None:
    model, tower = build(), TOWERS[build]
    inputs = image_inputs(model, LENGTH)
    whole, vision = state(model), state(model.get_submodule(tower))
    outputs, logits = hashes(model, tower, inputs)
    assert len(outputs) > 10
    assert {entry[-1] for entry in vision.values()} == {"sdpa", None}

    patch_model(model, CONFIG)
    assert state(model.get_submodule(tower)) == vision
    assert model.config.vision_config._attn_implementation == "sdpa"
    patched_outputs, patched_logits = hashes(model, tower, inputs)
    assert patched_outputs == outputs
    assert not torch.equal(patched_logits, logits) and patched_logits.isfinite().all()
    layers = sparsity_report(model).layers
    assert not any(layer.name.startswith(tower) for layer in layers)
    assert sum(layer.decode.sparse_calls for layer in layers) > 0
    assert state(model.get_submodule(tower)) == vision

    unpatch_model(model)
    assert state(model) == whole
    again, same_logits = hashes(model, tower, inputs)
    assert again == outputs and torch.equal(same_logits, logits)
