"""Block-sparse attention: causal attention over the key blocks and single columns that a `BlockPlan` lists.

Backends: `reference` (float32 softmax under the plan's mask, the oracle), `torch` (gathers only the planned keys; for
CPUs), `triton` (one kernel for every plan) and `flash` (flash-attn-4's kernel, where it is installed and serves).
Contract of every backend: float16, bfloat16 or float32; grouped KV heads without repeating them; `Dv != D`; any scale;
softcap; left padding per row; `q_start > 0`; any length and strides; a query with no key gives 0, never NaN;
accumulation in float32; LSE in natural log on request (`-inf` for a query with no key).

A plan with a `pv_threshold` leaves out tiles of its blocks as it goes, in every backend the same ones. Queries and keys
of a row are cut into tiles of `tile_side` tokens, and each tile of queries goes through the planned tiles of keys in
their order. A tile of keys in which every query's largest logit lies at least `pv_threshold` below the largest that the
query met in the tiles before, in log2 units (logit times log2 e), is in neither the output nor the LSE. The last tile
always is. Each that is left out holds at most `tile_side * 2 ** -pv_threshold` of a query's sum of weights. `flash`
does not serve such plans.
"""

from sparse_patch.ops.block_sparse.dispatch import BACKENDS, attend, fastest, unsupported
from sparse_patch.ops.block_sparse.tiles import tile_side

__all__ = ["BACKENDS", "attend", "fastest", "tile_side", "unsupported"]
