"""Choice of the backend: a module here with `attend`."""

from typing import Any

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops import backends
from sparse_patch.plans import PagePlan

BACKENDS = ("reference", "torch", "triton")


def attend(
    call: AttentionCall, plan: PagePlan, backend: str = "auto", return_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Attention over the planned keys. Query `i` of `Sq` stands at position `length - Sq + i` of its row.

    Args:
        call: the attention call, of decode.
        plan: the pages to read; made for this call.
        backend: one of `BACKENDS`, or "auto" or "flash" for the fastest one that serves the call.
        return_lse: whether to compute the LSE as well; a plan that `wants_logits` gets it always.

    Returns:
        The output `[B, Hq, Sq, Dv]` in the dtype of `call.q`; the LSE `[B, Hq, Sq]` in float32, or None; and, if the
        plan `wants_logits`, the logits of the last query in float32, `[B, Hq, capacity]` by position within the row,
        scaled and softcapped, else None. Logits at the row's length and behind have no meaning.

    Raises:
        UnsupportedCallError: the backend cannot serve the call; `unsupported` tells before.
    """
    if backend in backends.OWN_CHOICE:
        backend = fastest(call, plan)
    elif reason := unsupported(call, plan, backend):
        raise UnsupportedCallError(reason)
    out, lse, logits = _module(backend).attend(call, plan)
    return out, lse if return_lse or plan.wants_logits else None, logits


def fastest(call: AttentionCall, plan: PagePlan) -> str:
    """The backend that "auto" stands for."""
    return backends.fastest(call)


def unsupported(call: AttentionCall, plan: PagePlan, backend: str) -> str | None:
    """Why a backend cannot serve a call; None if it can, as "auto" and "flash" always can."""
    return backends.unsupported(call, backend)


def _module(backend: str) -> Any:
    """The backend's module, by statements that torch.compile can trace."""
    if backend == "triton":
        from sparse_patch.ops.page_decode import triton

        return triton
    if backend == "torch":
        from sparse_patch.ops.page_decode import torch

        return torch
    from sparse_patch.ops.page_decode import reference

    return reference
