"""Decode attention over pages: a few queries against the keys that a `PagePlan` lists, or against every key.

Backends: `reference` (float32 softmax under the plan's mask, the oracle), `torch` (gathers the listed keys, unless the
lists name more keys than there are; for CPUs, by `one_token` where that serves) and `triton` (split-KV flash decoding:
one kernel for every plan, and one that merges the splits).
Contract of every backend: float16, bfloat16 or float32; grouped KV heads without repeating them; `Dv != D`; any
positive scale; softcap; left padding per row; static buffers, which are not read at or after `kv_end`; any
length and strides; a query with no key gives 0, never NaN; accumulation in float32; LSE in natural log (`-inf` for a
query with no key); no tensor value is read on the host. Padding and the tail of a buffer may hold anything. A key that
is not listed has no influence if it is finite.
"""

from typing import Any

from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention import one_token
from sparse_patch.ops.attention.op import AttentionOp
from sparse_patch.plans import PagePlan

__all__ = ["OP", "attend", "fastest", "is_one_kernel", "why_unsupported"]


def _module(backend: str) -> Any:
    """The backend's module, imported by statements that torch.compile can trace."""
    if backend == "triton":
        from sparse_patch.ops.attention.page_decode import triton

        return triton
    if backend == "torch":
        from sparse_patch.ops.attention.page_decode import torch

        return torch
    from sparse_patch.ops.attention.page_decode import reference

    return reference


OP = AttentionOp(PagePlan, _module, ("reference", "torch", "triton"))
attend, fastest, why_unsupported = OP.attend, OP.fastest, OP.why_unsupported


def is_one_kernel(call: AttentionCall) -> bool:
    """Whether backend `torch` attends to every key by `one_token`, which is faster than PyTorch for grouped heads."""
    return one_token.serves(call) and call.kv_start is None and call.kv_end is None
