"""The oracle: a float32 softmax under the plan's token mask. Slow and N x N large, obviously right."""

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.plans import BlockPlan


def attend(call: AttentionCall, plan: BlockPlan, return_lse: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `ops.block_sparse.attend`."""
    k = call.k.float().repeat_interleave(call.group_size, dim=1)
    v = call.v.float().repeat_interleave(call.group_size, dim=1)
    logits = apply_softcap(call.q.float() @ k.transpose(-1, -2) * call.scale, call.softcap)
    logits = logits.masked_fill(~plan.mask(), -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
    return (weights @ v).to(call.q.dtype), lse if return_lse else None
