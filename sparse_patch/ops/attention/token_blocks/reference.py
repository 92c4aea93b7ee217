"""The oracle: a float32 softmax under the plan's token mask. It is slow and N x N large, but obviously right."""

from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.attention.span.reference import attend_under
from sparse_patch.plans import TokenBlockPlan


def attend(call: AttentionCall, plan: TokenBlockPlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.token_blocks.attend`."""
    return attend_under(call, call.k, call.v, plan.mask())
