"""What the model asks of the hook: one attention call, as Transformers makes it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from sparse_patch.integration.layer_state import LayerState
from sparse_patch.integration.masks import LazyMask

SINKS = "s_aux"  # the argument in which Transformers passes the logits of attention sinks (gpt-oss)


@dataclass(eq=False)
class Request:
    """One attention call; see `sparse_attention` for the arguments.

    Attributes:
        state: the state of the patched module.
        module: the attention module.
        query: `[B, Hq, Sq, D]`.
        key: `[B, Hkv, Skv, D]`, everything the cache returns.
        value: `[B, Hkv, Skv, Dv]`.
        mask: a `LazyMask`, or what the caller passed instead.
        scaling: factor on the logits; None for `D ** -0.5`.
        kwargs: the other arguments, by their names in Transformers.
        sinks: the logits of attention sinks in the softmax, `[Hq]`; None for a model without sinks.
    """

    state: LayerState
    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    scaling: float | None
    kwargs: dict[str, Any]
    sinks: torch.Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.sinks = self.kwargs.get(SINKS)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value

    def having(self, tensors: Iterable[torch.Tensor]) -> "Request":
        """The same request with its query, key and value in another precision."""
        query, key, value = tensors
        return replace(self, query=query, key=key, value=value)

    @property
    def is_step(self) -> bool:
        """Whether the forward is a step, see `integration.step`."""
        return isinstance(self.mask, LazyMask) and self.mask.step is not None

    @property
    def has_window(self) -> bool:
        """Whether the layer has a sliding window or chunks."""
        return bool(self.kwargs.get("sliding_window")) or (
            isinstance(self.mask, LazyMask) and self.mask.window is not None
        )

    @property
    def wants_weights(self) -> bool:
        """Whether the attention weights are asked for. The config counts only if the implementation can give them."""
        return bool(self.kwargs.get("output_attentions")) or (
            self.state.has_weights and bool(getattr(self.module.config, "output_attentions", False))
        )
