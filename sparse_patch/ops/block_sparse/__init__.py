"""Block-sparse attention: causal attention over the key blocks and single columns that a `BlockPlan` lists.

Backends: `reference` (float32 softmax under the plan's mask, the oracle), `torch` (gathers only the planned keys; for
CPUs), `triton` (one kernel for every plan) and `flash` (flash-attn-4's kernel, where it is installed and serves).
Contract of every backend: float16, bfloat16 or float32; grouped KV heads without repeating them; `Dv != D`; any scale;
softcap; left padding per row; `q_start > 0`; any length and strides; a query with no key gives 0, never NaN;
accumulation in float32; LSE in natural log on request (`-inf` for a query with no key).
"""

from sparse_patch.ops.block_sparse.dispatch import BACKENDS, attend, fastest, unsupported

__all__ = ["BACKENDS", "attend", "fastest", "unsupported"]
