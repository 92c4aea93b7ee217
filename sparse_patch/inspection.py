"""What a configuration means for a model, without its weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from sparse_patch.call import PHASES
from sparse_patch.config import PatchConfig
from sparse_patch.errors import SparsePatchError
from sparse_patch.minicpm import is_minicpm, minicpm_config
from sparse_patch.model_shape import ModelShape, attention_kind, config_of_layer
from sparse_patch.patching import patched, sparsity_report
from sparse_patch.report import LayerReport


def layers_of(model: str | Path, settings: PatchConfig) -> list[dict[str, Any]]:
    """What each layer of a model would run, from the model's config alone.

    Args:
        model: a model folder or id.
        settings: the configuration.

    Raises:
        SparsePatchError: the model is not there, or cannot be patched.
    """
    try:
        config = minicpm_config(model) if is_minicpm(model) else AutoConfig.from_pretrained(model)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise SparsePatchError(f"--model: {model}: cannot be loaded: {reason}") from None
    text = skeleton.config.get_text_config(decoder=True)
    with patched(skeleton, settings):
        layers = sparsity_report(skeleton).layers
        resolved = settings.for_model(ModelShape.of(text, 1 + max(layer.layer for layer in layers)))
        return [
            {
                "layer": layer.layer,
                "attention": attention_kind(text, layer.layer),
                **_heads(config_of_layer(text, layer.layer)),
                "prefill": layer.prefill_method or "dense",
                "decode": layer.decode_method or "dense",
                "role": _roles(resolved, layer, text),
            }
            for layer in layers
        ]


def _heads(config: PreTrainedConfig) -> dict[str, int]:
    return {
        "query_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }


def _roles(settings: PatchConfig, layer: LayerReport, config: PreTrainedConfig) -> str:
    """What a layer does in prefill and in decode, as far as its methods say more than their names."""
    if attention_kind(config, layer.layer) != "full":
        return ""
    used = {"prefill": layer.prefill_method, "decode": layer.decode_method}
    methods = (settings.method(phase) for phase in PHASES if used[phase])
    roles = (method.role(layer.layer) for method in methods if method is not None)
    return ", ".join(dict.fromkeys(role for role in roles if role))
