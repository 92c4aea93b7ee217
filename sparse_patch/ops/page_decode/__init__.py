"""Decode attention over pages: a few queries against the keys that a `PagePlan` lists, or against every key.

Backends: `reference` (float32 softmax under the plan's mask, the oracle), `torch` (gathers only the listed keys; for
CPUs) and `triton` (split-KV flash decoding: one kernel for every plan, one that merges the splits).
Contract of every backend: float16, bfloat16 or float32; grouped KV heads without repeating them; `Dv != D`; any
positive scale; softcap; left padding per row; static buffers, of which nothing is read at `kv_end` or behind; any
length and strides; a query with no key gives 0, never NaN; accumulation in float32; LSE in natural log (`-inf` for a
query with no key); no value of a tensor is read on the host.
"""

from sparse_patch.ops.page_decode.dispatch import BACKENDS, attend, fastest, unsupported

__all__ = ["BACKENDS", "attend", "fastest", "unsupported"]
