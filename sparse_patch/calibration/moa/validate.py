"""The cost of head schedules under the mask that they run with: the cross-entropy of answers."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from sparse_patch.artefacts.head_schedules import HeadSchedules
from sparse_patch.calibration.moa.hook import attention_by
from sparse_patch.calibration.moa.influence import answer_loss, dense_attention
from sparse_patch.calibration.moa.prompts import Prompt
from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention import span
from sparse_patch.plans import SpanPlan


@torch.no_grad()
def loss_under(model: PreTrainedModel, rules: HeadSchedules | None, length: int, prompt: Prompt) -> float:
    """The loss of an answer under head schedules, or with dense attention.

    Args:
        model: an unpatched model; it is unpatched afterwards too.
        rules: the schedules; None for dense attention.
        length: length M that the spans are computed for.
        prompt: a prompt with an answer.
    """

    def attend(call: AttentionCall, _: Callable[[], torch.Tensor]) -> torch.Tensor:
        if rules is None:
            return dense_attention(call).transpose(1, 2)
        return span.attend(call, SpanPlan.of(call, *rules.spans(call.layer, length)))[0].transpose(1, 2)

    with attention_by(model, attend):
        return float(answer_loss(model, prompt.tokens, prompt.answer))
