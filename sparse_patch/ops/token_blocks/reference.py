"""The oracle: a float32 softmax under the plan's token mask. Slow and N x N large, obviously right."""

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.ops.span.reference import attend_under
from sparse_patch.plans import TokenBlockPlan


def attend(
    call: AttentionCall, plan: TokenBlockPlan, return_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `ops.token_blocks.attend`."""
    output, lse = attend_under(call, call.k, call.v, plan.mask())
    return output, lse if return_lse else None
