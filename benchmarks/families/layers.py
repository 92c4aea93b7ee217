"""The layers of a model that use Transformers' attention interface, and their kinds by the model's config."""

import inspect
from typing import Any

import torch
from tiny_models import HEADS, HIDDEN
from transformers import PreTrainedModel

from sparse_patch.model_shape import ModelShape


def layers_of(model: PreTrainedModel) -> list[int]:
    """Indices of the layers whose attention uses Transformers' attention interface."""
    text = model.config.get_text_config(decoder=True)
    of = [module for module in model.modules() if asks_the_interface(module) and module.config is text]
    layers: set[Any] = {getattr(module, "layer_idx", None) for module in of}
    return sorted(layer for layer in layers if isinstance(layer, int) and layer >= 0)


def kind_of(model: PreTrainedModel, layer: int) -> str:
    """ "full", or another kind from the config. Hybrid layers (full attention beside linear attention) are "full"."""
    text = model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    kind = str(kinds[layer]).removesuffix("_attention") if kinds else "sliding" if windowed else "full"
    return "full" if kind == "hybrid" else kind


def first_full_layer(model: PreTrainedModel) -> int:
    """The first layer with full attention, or else the first layer with any attention."""
    layers = layers_of(model) or [0]
    return next((layer for layer in layers if kind_of(model, layer) == "full"), layers[0])


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape that calibration files are made for; an arbitrary one if the model has no attention."""
    layers = layers_of(model)
    return ModelShape.of(model.config, 1 + layers[-1]) if layers else ModelShape("none", 1, HEADS, 2, HIDDEN)


def asks_the_interface(module: torch.nn.Module) -> bool:
    """Whether a module's forward uses Transformers' attention interface."""
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names
