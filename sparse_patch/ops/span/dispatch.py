"""Choice of the backend: a module here with `attend`."""

from typing import Any

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops import backends
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
    if backend in backends.OWN_CHOICE:
        backend = fastest(call, plan)
    elif reason := unsupported(call, plan, backend):
        raise UnsupportedCallError(reason)
    attended: tuple[torch.Tensor, torch.Tensor] = _module(backend).attend(call, plan)
    return attended


def fastest(call: AttentionCall, plan: SpanPlan) -> str:
    """The backend that "auto" stands for."""
    return backends.fastest(call)


def unsupported(call: AttentionCall, plan: SpanPlan, backend: str) -> str | None:
    """Why a backend cannot serve a call; None if it can, as "auto" and "flash" always can."""
    return backends.unsupported(call, backend)


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
