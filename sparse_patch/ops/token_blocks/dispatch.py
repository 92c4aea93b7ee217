"""Choice of the backend: a module here with `attend`."""

from typing import Any

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops.backends import OWN_CHOICE, takes_triton, triton_unsupported
from sparse_patch.plans import TokenBlockPlan

BACKENDS = ("reference", "torch", "triton")


def attend(
    call: AttentionCall, plan: TokenBlockPlan, backend: str = "auto", return_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the planned keys.

    Args:
        call: the attention call, of prefill.
        plan: the blocks to read; made for this call.
        backend: one of `BACKENDS`, or "auto" or "flash" for the fastest one that serves the call.
        return_lse: whether to compute the LSE as well.

    Returns:
        The output `[B, Hq, Sq, Dv]` in the dtype of `call.q`, and the LSE `[B, Hq, Sq]` in float32 or None.

    Raises:
        UnsupportedCallError: the backend cannot serve the call; `unsupported` tells before.
    """
    if backend in OWN_CHOICE:
        backend = fastest(call, plan)
    elif reason := unsupported(call, plan, backend):
        raise UnsupportedCallError(reason)
    attended: tuple[torch.Tensor, torch.Tensor | None] = _module(backend).attend(call, plan, return_lse)
    return attended


def fastest(call: AttentionCall, plan: TokenBlockPlan) -> str:
    """The backend that "auto" stands for."""
    return "triton" if takes_triton(call.q) and unsupported(call, plan, "triton") is None else "torch"


def unsupported(call: AttentionCall, plan: TokenBlockPlan, backend: str) -> str | None:
    """Why a backend cannot serve a call; None if it can, as "auto" and "flash" always can."""
    if backend != "triton":
        return None
    why: str | None = triton_unsupported(call.q) or _module(backend).unsupported(call, plan)
    return why


def _module(backend: str) -> Any:
    """The backend's module, by statements that torch.compile can trace."""
    if backend == "triton":
        from sparse_patch.ops.token_blocks import triton

        return triton
    if backend == "torch":
        from sparse_patch.ops.token_blocks import torch

        return torch
    from sparse_patch.ops.token_blocks import reference

    return reference
