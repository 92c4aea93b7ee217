"""Attention with sinks in the softmax (gpt-oss) by its formula, in float64. Nothing here knows `sparse_patch`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "sinks_oracle"
Masks = dict[int, list[torch.Tensor | None]]  # of each layer, call by call


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of a softmax that has one more logit for each head, which no value belongs to.

    Args:
        q: `[B, Hq, Sq, D]`.
        k: `[B, Hkv, Skv, D]`.
        v: `[B, Hkv, Skv, Dv]`.
        mask: the keys that are read, bool `[B, Hq, Sq, Skv]`.
        scale: factor on the logits.
        sinks: `[Hq]`.
    """
    q, k, v = (x.double().nan_to_num(0) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    one_more = sinks.double()[:, None, None].expand(*logits.shape[:-1], 1)
    logits = torch.cat([logits, one_more], -1)
    return logits.softmax(-1)[..., :-1] @ v, logits.logsumexp(-1)


@contextmanager
def sinks_by_masks(model: PreTrainedModel, masks: Masks) -> Iterator[None]:
    """The model with this attention; a call without a mask reads by the model's own."""
    left = {layer: iter(of_layer) for layer, of_layer in masks.items()}

    def attend(
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attention_mask: torch.Tensor,
        scaling: float,
        s_aux: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        mask = next(left.get(module.layer_idx, iter(())), None)  # type: ignore[arg-type]
        mask = (attention_mask == 0).expand(-1, q.shape[1], -1, -1) if mask is None else mask[..., : k.shape[2]]
        return attention(q, k, v, mask, scaling, s_aux)[0].to(q.dtype).transpose(1, 2), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
