"""The oracle: a float32 softmax under the plan's token mask. It is slow and N x N large, but obviously right."""

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.attention.op import Attended
from sparse_patch.plans import SpanPlan


def attend(call: AttentionCall, plan: SpanPlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.span.attend`."""
    return attend_under(call, call.k, call.v, plan.mask())


def attend_under(call: AttentionCall, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> Attended:
    """The call's queries over keys and values `[B, Hkv, T, D]` under a mask `[B, Hq, Sq, T]`: output and LSE."""
    unread = ~mask.any(2)[..., None]  # unread keys may hold anything: 0 * NaN is NaN
    k, v = (x.float().repeat_interleave(call.group_size, 1).masked_fill(unread, 0.0) for x in (k, v))
    logits = apply_softcap(call.q.float() @ k.transpose(-1, -2) * call.scale, call.softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
    return Attended((weights @ v).to(call.q.dtype), lse)
