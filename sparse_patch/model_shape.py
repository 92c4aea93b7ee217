"""What a method may know of a model before it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class ModelShape:
    """The sizes that tell one model from another. Published settings and calibrations hold for one shape.

    Attributes:
        model_type: Transformers' name of the architecture, of the text tower.
        num_layers: layers, those without full attention too.
        num_heads: query heads of a layer.
        num_kv_heads: KV heads of a layer.
        hidden_size: width of the residual stream.
        local_layers: layers without full attention (sliding window, chunks, linear). Not compared: a model is the
            same with and without.
        sparse_config: the settings of InfLLM-V2 that a checkpoint was trained with, as its config has them; None for
            most. Not compared either.
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
            config: of the model, or of its text tower.
            num_layers: one more than the highest layer that has attention.
        """
        text = config.get_text_config(decoder=True)
        heads = int(text.num_attention_heads)
        return cls(
            model_type=str(text.model_type),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            hidden_size=int(text.hidden_size),
            local_layers=frozenset(layer for layer in range(num_layers) if attention_kind(text, layer) != "full"),
            sparse_config=getattr(text, "sparse_config", None),
        )


def attention_kind(config: PreTrainedConfig, layer: int) -> str:
    """ "full", or the kind of local attention that the model itself gives a layer (which stays dense)."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return str(kinds[layer]).removesuffix("_attention")
    return "sliding" if getattr(config, "sliding_window", None) else "full"
