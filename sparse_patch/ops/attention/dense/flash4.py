"""flash-attn-4's forward (CuTe DSL) on Hopper, when the package is installed."""

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention import flash_attn_4


def why_unsupported(call: AttentionCall) -> str | None:
    """Why this kernel cannot serve the call; None if it can. The caller checks padding and softcap first."""
    return flash_attn_4.why_unsupported(call, "kernel flash4")


def attend(call: AttentionCall) -> torch.Tensor:
    """See `ops.attention.dense.attend`. The triangle is aligned at the bottom right, so a chunk may follow others."""
    from flash_attn.cute.interface import flash_attn_func

    out: torch.Tensor = flash_attn_func(
        *(x.transpose(1, 2) for x in (call.q, call.k, call.v)), softmax_scale=call.scale, causal=True
    )[0]
    return out.transpose(1, 2)
