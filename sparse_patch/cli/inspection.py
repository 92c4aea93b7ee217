"""The effect of a configuration on a model, without loading its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sparse_patch.call import PHASES
from sparse_patch.config import BoundConfig, PatchConfig
from sparse_patch.integration.patching import patched
from sparse_patch.integration.reporting import sparsity_report
from sparse_patch.model_shape import ModelShape, attention_kind, can_forget, config_of_layer, kv_heads_of
from sparse_patch.models.loading import loading, native_config
from sparse_patch.ops.attention.span_ring import RingLayout
from sparse_patch.report import LayerReport
from sparse_patch.tensor_parallel import ALL_HEADS


@dataclass(frozen=True)
class KVBytes:
    """Bytes of the keys and values of one row in the layers with full attention.

    Attributes:
        length: tokens of the row.
        planned: bytes that the spans of the decode method keep.
        dense: bytes of a cache of all tokens.
    """

    length: int
    planned: int
    dense: int


def inspect(
    model: str | Path, settings: PatchConfig, length: int = 16384
) -> tuple[list[dict[str, Any]], KVBytes | None]:
    """What each layer of a model would run, and what its cache would take, from the model's config only.

    Args:
        model: a model folder or hub id.
        settings: the configuration.
        length: tokens of prompt and answer, for the cache size.

    Returns:
        A mapping for each layer, and the cache's bytes; None if decode has no spans, so that everything is kept.

    Raises:
        SparsePatchError: the model cannot be found or cannot be patched.
    """
    config = native_config(model)
    with loading("--model", model), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    text = skeleton.config.get_text_config(decoder=True)
    with patched(skeleton, settings):
        layers = sparsity_report(skeleton).layers
        bound = settings.bind(ModelShape.of(text, 1 + max(layer.layer for layer in layers)))
        rows = [
            {
                "layer": layer.layer,
                "attention": attention_kind(text, layer.layer),
                **_heads(config_of_layer(text, layer.layer)),
                "prefill": layer.prefill_method or "dense",
                "decode": layer.decode_method or "dense",
                "role": _roles(bound, layer, text),
            }
            for layer in layers
        ]
        return rows, _kv_bytes(bound, rows, length, text)


def _kv_bytes(
    bound: BoundConfig, layers: list[dict[str, Any]], length: int, config: PreTrainedConfig
) -> KVBytes | None:
    retention = bound.decode.retention if bound.decode is not None else None
    if retention is None or not can_forget(config):
        return None
    planned = dense = 0
    each = config.dtype.itemsize if isinstance(config.dtype, torch.dtype) else 2
    for layer in layers:
        if layer["attention"] != "full":
            continue
        heads = layer["kv_heads"]
        token = 2 * layer["head_dim"] * each
        dense += token * heads * length
        ring = RingLayout.of(*retention.spans_of(ALL_HEADS, layer["layer"], length, heads), room=length)
        planned += token * (ring.total if layer["decode"] != "dense" else heads * length)
    return KVBytes(length, planned, dense)


def _heads(config: PreTrainedConfig) -> dict[str, int]:
    return {
        "query_heads": config.num_attention_heads,
        "kv_heads": kv_heads_of(config),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }


def _roles(bound: BoundConfig, layer: LayerReport, config: PreTrainedConfig) -> str:
    """A layer's roles in prefill and decode; empty if its methods have none."""
    if attention_kind(config, layer.layer) != "full":
        return ""
    used = {"prefill": layer.prefill_method, "decode": layer.decode_method}
    methods = (bound.method(phase) for phase in PHASES if used[phase])
    roles = (method.role(layer.layer) for method in methods if method is not None)
    return ", ".join(dict.fromkeys(role for role in roles if role))
