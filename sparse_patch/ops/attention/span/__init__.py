"""Span attention: each query reads the first keys of its row and a window up to itself, by KV head (`SpanPlan`).

Here all keys of a row are in the call's buffers; `ops.attention.span_ring` is the same attention over a cache that
keeps only the spans. Backends: `reference` (float32 softmax under the plan's mask, the oracle), `torch` (gathers only
the keys that a slice of queries reads; for CPUs) and `triton` (one kernel, which reads no tile outside the spans).
Contract of every backend: float16, bfloat16 or float32; grouped KV heads without repeating them; `Dv != D`; any
positive scale; softcap; left padding per row; chunks, `q_start > 0`; static buffers, which are not read at or after
`kv_end`; any length and strides; a query with no key gives 0, never NaN; accumulation in float32; LSE in natural log
(`-inf` for a query with no key); no tensor value is read on the host.

A `kv_start` may be negative. Then the row began that many tokens before the first key of the buffer, and queries read
only the keys of their spans that are in the buffer.
"""

from typing import Any

from sparse_patch.ops.attention.op import AttentionOp
from sparse_patch.plans import SpanPlan

__all__ = ["OP", "attend", "fastest", "why_unsupported"]


def _module(backend: str) -> Any:
    """The backend's module, imported by statements that torch.compile can trace."""
    if backend == "triton":
        from sparse_patch.ops.attention.span import triton

        return triton
    if backend == "torch":
        from sparse_patch.ops.attention.span import torch

        return torch
    from sparse_patch.ops.attention.span import reference

    return reference


OP = AttentionOp(SpanPlan, _module, ("reference", "torch", "triton"))
attend, fastest, why_unsupported = OP.attend, OP.fastest, OP.why_unsupported
