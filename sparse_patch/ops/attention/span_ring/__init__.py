"""Span attention over a cache that keeps, per KV head, the first keys of a row and a ring of its last ones.

It is the attention of `ops.attention.span` over all keys ever seen, however the prompt was cut. A forward of several
tokens first attends to the ring as it was and to its own keys, then writes its keys. A forward of one token first
writes, then attends to the ring only, which holds exactly what that token reads:

    before = tokens_before(seen, kv_start, batch, device)    # once per forward
    if Sq > 1: attend(call, ring, before), then write(ring, k, v, before)
    else:      write(ring, k, v, before), then attend(call, ring, before)

A forward with no tokens before it needs no ring: `ops.attention.span` does the same with less work.
Backends: `reference` (float32 softmax over what the slots hold, the oracle), `torch` (for CPUs) and `triton` (one
kernel over the slots, split for single tokens; it continues from the output of the kernel of `ops.attention.span` over
the forward's own keys).
Contract of every backend: float16, bfloat16 or float32; grouped KV heads without repeating them; `Dv != D`; any
positive scale; softcap; left padding per row, which is neither read nor written; heads of different capacity; any
length; a query with no key gives 0, never NaN; accumulation in float32; LSE in natural log (`-inf` for a query with no
key); no tensor value is read on the host.
"""

from sparse_patch.ops.attention.span_ring.dispatch import attend, prepare, write
from sparse_patch.ops.attention.span_ring.ring import Ring, RingLayout, tokens_before
from sparse_patch.ops.backends import fastest, why_unsupported

__all__ = [
    "Ring",
    "RingLayout",
    "attend",
    "fastest",
    "prepare",
    "tokens_before",
    "why_unsupported",
    "write",
]
