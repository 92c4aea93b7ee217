"""Span attention over a cache that keeps, per KV head, the first keys of a row and a ring of its last ones.

It is the attention of `ops.attention.span` over all keys ever seen, whatever the prompt was cut into. A forward of several tokens
attends first, to the ring as it was and to its own keys, and writes them then; a forward of one token writes first and
attends to the ring alone, which holds just what that token reads:

    before = tokens_before(seen, kv_start, batch, device)    # once a forward
    if Sq > 1: attend(call, ring, before), then write(ring, k, v, before)
    else:      write(ring, k, v, before), then attend(call, ring, before)

A forward with nothing before it needs no ring: `ops.attention.span` does the same with less.
Backends: `reference` (float32 softmax over what the slots hold, the oracle), `torch` (for CPUs) and `triton` (one
kernel over the slots, split for single tokens; the forward's own keys by the kernel of `ops.attention.span`, whose output it goes
on from).
Contract of every backend: float16, bfloat16 or float32; grouped KV heads without repeating them; `Dv != D`; any
positive scale; softcap; left padding per row, which is neither read nor written; heads of different capacity; any
length; a query with no key gives 0, never NaN; accumulation in float32; LSE in natural log (`-inf` for a query with no
key); no value of a tensor is read on the host.
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
