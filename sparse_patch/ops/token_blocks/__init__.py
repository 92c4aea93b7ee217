"""Attention over the key blocks of a `TokenBlockPlan`, which gives every token blocks of its own.

Backends: `reference` (float32 softmax under the plan's mask, the oracle), `torch` (gathers only the planned blocks; for
CPUs) and `triton`. Contract of every backend: float16, bfloat16 or float32; grouped KV heads without repeating them;
`Dv != D`; any positive scale; softcap; left padding per row; `q_start > 0`; any length and strides; padding queries
give 0, never NaN; accumulation in float32; LSE in natural log on request (`-inf` for padding).
"""

from sparse_patch.ops.token_blocks.dispatch import BACKENDS, attend, fastest, unsupported

__all__ = ["BACKENDS", "attend", "fastest", "unsupported"]
