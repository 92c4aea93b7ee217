"""Choice of the backend: each is a module here with `attend` and `write`."""

from typing import Any

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.kernels.availability import prefers_triton, why_no_triton
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.attention.span_ring.ring import Ring
from sparse_patch.ops.backends import DEFERS_TO_AUTO, fastest, why_unsupported


def attend(
    call: AttentionCall,
    ring: Ring,
    before: torch.Tensor,
    backend: str = "auto",
    known: int | None = None,
    return_lse: bool = True,
) -> Attended:
    """Attention of a forward's queries to all keys of their spans, in the ring and in the forward.

    Args:
        call: queries, keys and values of the forward only, scale and softcap; its other fields are not read.
        ring: for one token, the ring after `write`; for several tokens, before it.
        before: tokens that each row had before the forward, int64 `[B]`, from `tokens_before`.
        backend: "reference", "torch" or "triton"; "auto" or "flash" for the fastest one that serves the call.
        known: the number in `before`, if it is the same for all rows and the host knows it. The result is the same
            without it, on a CPU more slowly.
        return_lse: whether the result must have the LSE.

    Raises:
        UnsupportedCallError: the backend cannot serve the call; `why_unsupported` says so in advance.
    """
    if backend in DEFERS_TO_AUTO:
        backend = fastest(call)
    elif reason := why_unsupported(call, backend):
        raise UnsupportedCallError(reason)
    of_host = (known, return_lse) if backend == "torch" else ()
    attended: Attended = _module(backend).attend(call, ring, before, *of_host)
    return attended


def write(
    ring: Ring,
    k: torch.Tensor,
    v: torch.Tensor,
    before: torch.Tensor,
    backend: str = "auto",
    known: int | None = None,
) -> None:
    """Write keys and values of a forward into the ring: those that the spans of later queries have.

    Args:
        ring: is changed in place.
        k: `[B, Hkv, S, D]`.
        v: `[B, Hkv, S, Dv]`.
        before: tokens that each row had before the forward, int64 `[B]`; padding is not written.
        backend: "reference", "torch" or "triton"; "auto" or "flash" for the fastest one.
        known: see `attend`.

    Raises:
        UnsupportedCallError: backend triton does not run on the device.
    """
    if backend in DEFERS_TO_AUTO:
        backend = "triton" if prefers_triton(k) else "torch"
    elif backend == "triton" and (reason := why_no_triton(k)):
        raise UnsupportedCallError(reason)
    if backend == "torch" and known is not None and k.shape[2] == 1:
        _module(backend).write_one(ring, k, v, known)
    else:
        _module(backend).write(ring, k, v, before)


def prepare(ring: Ring) -> None:
    """Copy the layout's tables for the kernels to the ring's device before a step is captured: a graph cannot do it."""
    if prefers_triton(ring.k):
        _module("triton").prepare(ring.layout, ring.k.device)


def _module(backend: str) -> Any:
    """The backend's module, imported by statements that torch.compile can trace."""
    if backend == "triton":
        from sparse_patch.ops.attention.span_ring import triton

        return triton
    if backend == "torch":
        from sparse_patch.ops.attention.span_ring import torch

        return torch
    from sparse_patch.ops.attention.span_ring import reference

    return reference
