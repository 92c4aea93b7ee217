"""Attention over the key blocks of a `TokenBlockPlan`, which gives every token its own blocks.

Backends: `reference` (float32 softmax under the plan's mask, the oracle), `torch` (gathers only the planned blocks; for
CPUs) and `triton`. Contract of every backend: float16, bfloat16 or float32; grouped KV heads without repeating them;
`Dv != D`; any positive scale; softcap; left padding per row; `q_start > 0`; any length and strides; padding queries
give 0, never NaN; accumulation in float32; LSE in natural log on request (`-inf` for padding).
"""

from typing import Any

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.availability import prefers_triton, why_no_triton
from sparse_patch.ops.attention.op import AttentionOp
from sparse_patch.plans import TokenBlockPlan

__all__ = ["OP", "attend", "fastest", "why_unsupported"]


def _fastest(call: AttentionCall, plan: TokenBlockPlan) -> str:
    return "triton" if prefers_triton(call.q) and _why(call, plan, "triton") is None else "torch"


def _why(call: AttentionCall, plan: TokenBlockPlan, backend: str) -> str | None:
    why: str | None = why_no_triton(call.q) or _module(backend).why_unsupported(call, plan)
    return why


def _module(backend: str) -> Any:
    """The backend's module, imported by statements that torch.compile can trace."""
    if backend == "triton":
        from sparse_patch.ops.attention.token_blocks import triton

        return triton
    if backend == "torch":
        from sparse_patch.ops.attention.token_blocks import torch

        return torch
    from sparse_patch.ops.attention.token_blocks import reference

    return reference


OP = AttentionOp(TokenBlockPlan, _module, ("reference", "torch", "triton"), _fastest, _why)
attend, fastest, why_unsupported = OP.attend, OP.fastest, OP.why_unsupported
