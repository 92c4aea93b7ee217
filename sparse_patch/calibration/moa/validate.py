"""What a plan costs under the mask that it runs with: the cross-entropy of answers."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_patch.calibration.moa.hook import attention_by
from sparse_patch.calibration.moa.influence import answer_loss, dense_attention
from sparse_patch.calibration.moa.prompts import Prompt
from sparse_patch.call import AttentionCall
from sparse_patch.methods.span_plans import SpanRules

_ROWS = 256  # queries at once

# The loss of a plan, or of dense attention for None, at a length M on a prompt.
LossOf = Callable[[SpanRules | None, int, Prompt], float]


def loss_under_masks(model: PreTrainedModel) -> LossOf:
    """Losses of a model that is not patched, with attention under the masks of a plan written out in PyTorch."""
    return partial(_loss, model)


@torch.no_grad()
def _loss(model: PreTrainedModel, rules: SpanRules | None, length: int, prompt: Prompt) -> float:
    def attend(call: AttentionCall, _: Callable[[], torch.Tensor]) -> torch.Tensor:
        if rules is None:
            return dense_attention(call).transpose(1, 2)
        return span_attention(call, *rules.spans(call.layer, length)).transpose(1, 2)

    with attention_by(model, attend):
        return float(answer_loss(model, prompt.tokens, prompt.answer))


def span_attention(call: AttentionCall, sinks: list[int], windows: list[int]) -> torch.Tensor:
    """`[B, Hq, Sq, Dv]` of a call from position 0: each KV head reads its first keys and a window of the last ones."""
    output = call.q.new_empty(*call.q.shape[:3], call.v.shape[-1])
    grouped = (call.q.unflatten(1, (len(sinks), -1)), output.unflatten(1, (len(sinks), -1)))
    for head, (sink, window) in enumerate(zip(sinks, windows, strict=True)):
        q, out = (x[:, head] for x in grouped)
        for begin in range(0, q.shape[2], _ROWS):
            rows = torch.arange(begin, min(begin + _ROWS, q.shape[2]), device=q.device)
            far = max(sink, begin - window + 1)  # what lies between is read by no row
            keys = torch.arange(int(rows[-1]) + 1, device=q.device)
            keys = keys[(keys < sink) | (keys >= far)]
            back = rows[:, None] - keys
            seen = (back >= 0) & ((keys < sink) | (back < window))
            k, v = (x[:, head, None, keys].expand(-1, q.shape[1], -1, -1) for x in (call.k, call.v))
            out[:, :, rows] = nn.functional.scaled_dot_product_attention(
                q[:, :, rows], k, v, attn_mask=seen, scale=call.scale
            )
    return output
