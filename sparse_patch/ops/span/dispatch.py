"""Choice of the backend: a module here with `attend`, and with `unsupported` if it does not serve every call."""

from typing import Any

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops.backends import OWN_CHOICE, takes_triton, triton_unsupported
from sparse_patch.plans import SpanPlan

BACKENDS = ("reference", "torch", "triton")


def attend(call: AttentionCall, plan: SpanPlan, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the keys of the spans.

    Args:
        call: the attention call, of prefill or decode.
        plan: the spans; made for this call.
        backend: one of `BACKENDS`, or "auto" or "flash" for the fastest one that serves the call.

    Returns:
        The output `[B, Hq, Sq, Dv]` in the dtype of `call.q`, and the LSE `[B, Hq, Sq]` in float32.

    Raises:
        UnsupportedCallError: the backend cannot serve the call; `unsupported` tells before.
    """
    if backend in OWN_CHOICE:
        backend = fastest(call, plan)
    elif reason := unsupported(call, plan, backend):
        raise UnsupportedCallError(reason)
    attended: tuple[torch.Tensor, torch.Tensor] = _module(backend).attend(call, plan)
    return attended


def fastest(call: AttentionCall, plan: SpanPlan) -> str:
    """The backend that "auto" stands for."""
    return "triton" if takes_triton(call.q) and unsupported(call, plan, "triton") is None else "torch"


def unsupported(call: AttentionCall, plan: SpanPlan, backend: str) -> str | None:
    """Why a backend cannot serve a call; None if it can, as "auto" and "flash" always can."""
    if backend in (*OWN_CHOICE, "torch", "reference"):
        return None
    if backend == "triton" and (reason := triton_unsupported(call.q)):
        return reason
    served: str | None = _module(backend).unsupported(call, plan)
    return served


def _module(backend: str) -> Any:
    """The backend's module, by statements that torch.compile can trace."""
    if backend == "triton":
        from sparse_patch.ops.span import triton

        return triton
    if backend == "torch":
        from sparse_patch.ops.span import torch

        return torch
    from sparse_patch.ops.span import reference

    return reference
