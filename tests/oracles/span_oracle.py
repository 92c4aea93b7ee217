"""Span attention from the paper's formula, on a whole cache: an attention function for an unpatched model.

Every head has its own boolean mask over all keys. Nothing here knows `sparse_patch`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "span_oracle"
# Sink and window of each KV head; a window may be a function of the queries' positions.
Spans = list[tuple[int, int | Callable[[torch.Tensor], torch.Tensor]]]


def moa_window(alpha: float, beta: float, length: int, sink: int, block: int, min_span: int) -> int:
    """MoA's window at a total length, as its public code computes it."""
    tokens = min(math.trunc(alpha + beta * length), length)
    return block * math.ceil(max(tokens, min_span) / block) - sink


def moa_current_window(alpha: float, beta: float, sink: int, min_span: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The window of a rule whose length is the query's own prefix."""
    return lambda query: torch.clamp(torch.floor(alpha + beta * (query + 1.0)), min=min_span) - sink


@contextmanager
def spans_by_mask(model: PreTrainedModel, spans: dict[int, Spans]) -> Iterator[None]:
    """The model with these spans on some of its layers; the other layers are dense."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    model.config._attn_implementation = NAME
    for module in modules:
        module.spans = spans.get(module.layer_idx)  # type: ignore[assignment]
    try:
        yield
    finally:
        model.config._attn_implementation = before
        for module in modules:
            del module.spans


def _attention(
    module: nn.Module,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    group = q.shape[1] // k.shape[1]
    visible = (attention_mask == 0).expand(-1, q.shape[1], -1, -1)  # causal, without padding
    if module.spans is not None:
        begin = visible[:, 0, -1].int().argmax(-1)[:, None, None]  # of each row, its first real token
        key = torch.arange(k.shape[2]) - begin
        query = (torch.arange(q.shape[2]) + k.shape[2] - q.shape[2])[:, None] - begin
        heads = [
            (key < sink) | (query - key < (window(query) if callable(window) else window))
            for sink, window in module.spans  # type: ignore[union-attr]
        ]
        visible = visible & torch.stack(heads, 1).repeat_interleave(group, 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = (q @ k.mT * scaling).masked_fill(~visible, -torch.inf)
    return (logits.softmax(-1).nan_to_num(0) @ v).transpose(1, 2), None
