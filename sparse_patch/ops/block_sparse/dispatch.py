"""Choice of the backend."""

from collections.abc import Callable

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.ops.block_sparse.reference import attend_reference
from sparse_patch.ops.block_sparse.torch import attend_torch
from sparse_patch.plans import BlockPlan

Attend = Callable[[AttentionCall, BlockPlan, bool], tuple[torch.Tensor, torch.Tensor | None]]

BACKENDS: dict[str, Attend] = {"reference": attend_reference, "torch": attend_torch}


def attend(
    call: AttentionCall, plan: BlockPlan, backend: str = "auto", return_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the planned blocks.

    Args:
        call: the attention call.
        plan: the blocks to read; made for this call.
        backend: a key of `BACKENDS`, or "auto" for the fastest one that serves this device.
        return_lse: whether to compute the LSE as well.

    Returns:
        The output `[B, Hq, Sq, Dv]` in the dtype of `call.q`, and the LSE `[B, Hq, Sq]` in float32 or None.
    """
    return BACKENDS["torch" if backend == "auto" else backend](call, plan, return_lse)
