"""What a method may know about a model before the model runs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from transformers import PreTrainedConfig

from sparse_patch.errors import FieldError
from sparse_patch.files.reading import MOST

# Other names of kinds, in older configs and for layers with a recurrence or a convolution beside their attention.
_KINDS = {"attention": "full", "hybrid": "full", "hybrid_sliding": "sliding"}


@dataclass(frozen=True)
class ModelShape:
    """The sizes that distinguish one model from another. Published settings and calibrations hold for one shape.

    Attributes:
        model_type: Transformers' name of the architecture, of the text tower.
        num_layers: number of layers, including those without full attention.
        num_heads: query heads of a layer.
        num_kv_heads: KV heads of a layer with full attention.
        hidden_size: width of the residual stream.
        local_layers: layers without full attention (sliding window, chunks, linear, cross-attention). Not compared: a
            model is the same with and without them.
        sparse_config: the InfLLM-V2 settings that a checkpoint was trained with, as in its config; None for most
            models. Not compared either.
    """

    model_type: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    local_layers: frozenset[int] = field(default=frozenset(), compare=False)
    sparse_config: Mapping[str, Any] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, config: PreTrainedConfig, num_layers: int) -> "ModelShape":
        """The shape of a model.

        Args:
            config: config of the model, or of its text tower.
            num_layers: one more than the highest layer that has attention.
        """
        text = config.get_text_config(decoder=True)
        local = frozenset(layer for layer in range(num_layers) if attention_kind(text, layer) != "full")
        of_layer = config_of_layer(text, min(set(range(num_layers)) - local, default=0))
        return cls(
            model_type=str(text.model_type),
            num_layers=num_layers,
            num_heads=int(of_layer.num_attention_heads),
            num_kv_heads=kv_heads_of(of_layer),
            hidden_size=int(text.hidden_size),
            local_layers=local,
            sparse_config=getattr(text, "sparse_config", None),
        )


def attention_kind(config: PreTrainedConfig, layer: int) -> str:
    """ "full", or the kind that the model gives a layer (which stays dense): "sliding", "chunked", "linear", ..."""
    if layer in (getattr(config, "cross_attention_layers", None) or ()):
        return "cross"
    kinds = getattr(config, "layer_types", None)
    if kinds:
        kind = str(kinds[layer]).removesuffix("_attention")
        return _KINDS.get(kind, kind)
    return "sliding" if getattr(config, "sliding_window", None) else "full"


def config_of_layer(config: PreTrainedConfig, layer: int) -> PreTrainedConfig:
    """The config with the sizes of one layer: the heads of Gemma 4's full and sliding layers differ."""
    of_layer: PreTrainedConfig = config
    if getattr(config, "is_heterogeneous", False):
        of_layer = config.per_layer_config[layer]
    return of_layer


def kv_heads_of(config: PreTrainedConfig) -> int:
    """KV heads of a layer: as many as query heads if the config does not say."""
    if getattr(config, "num_key_value_heads", None):
        return int(config.num_key_value_heads)
    return 1 if getattr(config, "multi_query", False) else int(config.num_attention_heads)


def can_forget(config: PreTrainedConfig) -> bool:
    """Whether layers can have rings: not if they read keys of other layers or if cached tensors have no heads."""
    return not (getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_lora_rank", None))


def layer_with_keys(config: PreTrainedConfig, layer: int) -> int:
    """The layer whose keys and values a layer reads: itself, or another layer if the last layers reuse keys.

    That other layer is the last of the same kind that has its own keys (Gemma 3n and 4, `num_kv_shared_layers`).
    """
    shared = int(getattr(config, "num_kv_shared_layers", 0) or 0)
    own = range(int(config.num_hidden_layers) - shared if shared else layer + 1)
    kind = attention_kind(config, layer)
    return layer if layer in own else max(other for other in own if attention_kind(config, other) == kind)


LayerIndex = Annotated[int, Field(ge=-MOST, le=MOST, description="layer from 0; negative counts from the last")]


def layer_numbers(field: str, layers: Iterable[int], num_layers: int) -> set[int]:
    """Layers as numbers from 0.

    Raises:
        FieldError: a layer that the model does not have.
    """
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise FieldError(
                field, f"the model has no layer {layer}", f"it has {num_layers} layers, 0 to {num_layers - 1}"
            )
    return {layer % num_layers for layer in layers}
