"""flash-attn-4's forward (CuTe DSL) on Hopper, when the package is installed."""

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.ops.block_sparse.flash import installed

_HEAD_DIMS = (64, 96, 128)


def unsupported(call: AttentionCall) -> str | None:
    """Why this kernel cannot serve the call; None if it can. Padding and softcap are asked about before."""
    if not call.q.is_cuda or torch.cuda.get_device_capability(call.q.device)[0] != 9:
        return "kernel flash4 needs a Hopper GPU"
    if not installed():
        return "kernel flash4 needs the package flash-attn-4"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"kernel flash4: dtype {call.q.dtype}"
    if call.q.shape[-1] not in _HEAD_DIMS or call.v.shape[-1] != call.q.shape[-1]:
        return f"kernel flash4: head_dim {call.q.shape[-1]} and {call.v.shape[-1]}"
    return None


def attend(call: AttentionCall) -> torch.Tensor:
    """See `ops.dense.attend`. The triangle is aligned at the bottom right, so a chunk may follow on others."""
    from flash_attn.cute.interface import flash_attn_func

    out: torch.Tensor = flash_attn_func(
        *(x.transpose(1, 2) for x in (call.q, call.k, call.v)), softmax_scale=call.scale, causal=True
    )[0]
    return out.transpose(1, 2)
