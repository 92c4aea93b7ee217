"""Choice of the backend: a module here with `attend`, and with `unsupported` if it does not serve every call."""

from typing import Any

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops.backends import triton_unsupported
from sparse_patch.plans import BlockPlan

BACKENDS = ("reference", "torch", "triton", "flash")
# Measured on an H200 at densities of 5 to 50 % (benchmarks/results): from here on flash is the faster one, below its
# launch, 0.3 to 0.4 ms on the host, costs more than its kernel saves.
_FLASH_LENGTH = 16384


def attend(
    call: AttentionCall, plan: BlockPlan, backend: str = "auto", return_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the planned keys.

    Args:
        call: the attention call.
        plan: the keys to read; made for this call.
        backend: one of `BACKENDS`, or "auto" for the fastest one that serves the call.
        return_lse: whether to compute the LSE as well.

    Returns:
        The output `[B, Hq, Sq, Dv]` in the dtype of `call.q`, and the LSE `[B, Hq, Sq]` in float32 or None.

    Raises:
        UnsupportedCallError: the backend cannot serve the call; `unsupported` tells before.
    """
    if backend == "auto":
        backend = fastest(call, plan)
    elif reason := unsupported(call, plan, backend):
        raise UnsupportedCallError(reason)
    attended: tuple[torch.Tensor, torch.Tensor | None] = _module(backend).attend(call, plan, return_lse)
    return attended


def fastest(call: AttentionCall, plan: BlockPlan) -> str:
    """The backend that "auto" stands for."""
    order: tuple[str, ...] = ()
    if call.q.is_cuda:
        order = ("flash", "triton") if call.kv_length >= _FLASH_LENGTH else ("triton",)
    return next((name for name in order if unsupported(call, plan, name) is None), "torch")


def unsupported(call: AttentionCall, plan: BlockPlan, backend: str) -> str | None:
    """Why a backend cannot serve a call; None if it can, as "auto" always can."""
    if backend in ("auto", "torch", "reference"):
        return None
    if backend == "triton" and (reason := triton_unsupported(call.q)):
        return reason
    why: str | None = _module(backend).unsupported(call, plan)
    return why


def _module(backend: str) -> Any:
    """The backend's module, by statements that torch.compile can trace."""
    if backend == "triton":
        from sparse_patch.ops.block_sparse import triton

        return triton
    if backend == "flash":
        from sparse_patch.ops.block_sparse import flash

        return flash
    if backend == "torch":
        from sparse_patch.ops.block_sparse import torch

        return torch
    from sparse_patch.ops.block_sparse import reference

    return reference
