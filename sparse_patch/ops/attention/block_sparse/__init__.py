"""Block-sparse attention: causal attention over the key blocks and single columns that a `BlockPlan` lists.

Backends: `reference` (float32 softmax under the plan's mask, the oracle), `torch` (gathers only the planned keys; for
CPUs), `triton` (one kernel for every plan) and `flash` (flash-attn-4's kernel, if it is installed and serves the call).
Contract of every backend: float16, bfloat16 or float32; grouped KV heads without repeating them; `Dv != D`; any scale;
softcap; left padding per row; `q_start > 0`; any length and strides; a query with no key gives 0, never NaN;
accumulation in float32; LSE in natural log on request (`-inf` for a query with no key).

A plan with a `pv_threshold` leaves out tiles of its blocks; every backend leaves out the same tiles. Queries and keys
of a row are cut into tiles of `tile_side` tokens, and each query tile reads the planned key tiles in their order. A key
tile is left out of both output and LSE if the largest logit of every query in it lies at least `pv_threshold` below the
largest logit of that query in the tiles before, in log2 units (logit times log2 e). The last tile is never left out. A
tile that is left out holds at most `tile_side * 2 ** -pv_threshold` of a query's sum of weights. `flash` does not serve
such plans.
"""

from typing import Any

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.availability import why_no_triton
from sparse_patch.ops.attention.block_sparse.tiles import tile_side
from sparse_patch.ops.attention.op import AttentionOp
from sparse_patch.plans import BlockPlan

__all__ = ["OP", "attend", "fastest", "tile_side", "why_unsupported"]

# Measured on an H200 at densities of 5 to 50 % (benchmarks/results): from this length on flash is faster. Below it,
# flash's launch (0.3 to 0.4 ms on the host) costs more than its kernel saves.
_FLASH_LENGTH = 16384


def _fastest(call: AttentionCall, plan: BlockPlan) -> str:
    order: tuple[str, ...] = ()
    if call.q.is_cuda:
        order = ("flash", "triton") if call.kv_length >= _FLASH_LENGTH else ("triton",)
    return next((name for name in order if _why(call, plan, name) is None), "torch")


def _why(call: AttentionCall, plan: BlockPlan, backend: str) -> str | None:
    if backend == "triton" and (reason := why_no_triton(call.q)):
        return reason
    why: str | None = _module(backend).why_unsupported(call, plan)
    return why


def _module(backend: str) -> Any:
    """The backend's module, imported by statements that torch.compile can trace."""
    if backend == "triton":
        from sparse_patch.ops.attention.block_sparse import triton

        return triton
    if backend == "flash":
        from sparse_patch.ops.attention.block_sparse import flash

        return flash
    if backend == "torch":
        from sparse_patch.ops.attention.block_sparse import torch

        return torch
    from sparse_patch.ops.attention.block_sparse import reference

    return reference


OP = AttentionOp(BlockPlan, _module, ("reference", "torch", "triton", "flash"), _fastest, _why)
attend, fastest, why_unsupported = OP.attend, OP.fastest, OP.why_unsupported
