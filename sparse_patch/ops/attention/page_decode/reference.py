"""The oracle: a float32 softmax under the plan's token mask. It is slow, but obviously right."""

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.attention.op import Attended
from sparse_patch.plans import PagePlan


def attend(call: AttentionCall, plan: PagePlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.page_decode.attend`."""
    mask = plan.mask()
    unread = ~mask.any(2)[..., None]  # unread keys may hold anything: 0 * NaN is NaN
    k, v = (x.float().repeat_interleave(call.group_size, 1).masked_fill(unread, 0.0) for x in (call.k, call.v))
    logits = apply_softcap(call.q.float() @ k.transpose(-1, -2) * call.scale, call.softcap)
    masked = logits.masked_fill(~mask, -torch.inf)
    lse = masked.logsumexp(-1)
    weights = torch.exp(masked - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
    out = (weights @ v).to(call.q.dtype)
    if not plan.wants_logits:
        return Attended(out, lse)
    last = logits[:, :, -1]
    slots = torch.arange(call.kv_length, device=call.k.device) + call.row_starts()[:, None]
    by_position = slots.clamp(max=call.kv_length - 1)
    return Attended(out, lse, last.gather(-1, by_position[:, None].expand_as(last)))
