"""flash-attn-4's block-sparse forward (CuTe DSL, Hopper), when the package is installed.

The kernel takes full blocks and masked blocks in two lists: the blocks of a plan below the diagonal are full, the
diagonal block is masked. Its blocks count from the first token of the buffer, so it serves neither padded batches nor
chunks that begin inside a block, and it has no single columns.
"""

from functools import cache
from typing import Any

from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention import flash_attn_4
from sparse_patch.ops.attention.op import Attended
from sparse_patch.plans import BlockPlan

_BLOCK = 128


def why_unsupported(call: AttentionCall, plan: BlockPlan) -> str | None:
    """Why this backend cannot execute the plan; None if it can."""
    if reason := flash_attn_4.why_unsupported(call, "backend flash"):
        return reason
    if plan.grid.block_size != _BLOCK:
        return f"backend flash: block_size {plan.grid.block_size}"
    if plan.columns is not None:
        return "backend flash: single columns"
    if plan.pv_threshold is not None:
        return "backend flash: pv_threshold"
    if plan.grid.padded or not plan.grid.aligned:
        return "backend flash: padding, or a chunk that begins inside a block"
    if call.softcap is not None:
        return "backend flash: softcap"
    return None


def attend(call: AttentionCall, plan: BlockPlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.block_sparse.attend`."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    diagonal = plan.grid.query_block_ids[:1].int()[:, None, :, None]  # the same for all rows and heads
    on_diagonal = plan.on_diagonal.int()
    out, lse = flash_attn_func(
        *(x.transpose(1, 2) for x in (call.q, call.k, call.v)),
        softmax_scale=call.scale,
        pack_gqa=False,
        mask_mod=_causal(),
        block_sparse_tensors=BlockSparseTensorsTorch(
            mask_block_cnt=on_diagonal,
            mask_block_idx=diagonal,
            full_block_cnt=plan.counts - on_diagonal,
            full_block_idx=plan.indices.contiguous(),
            block_size=(_BLOCK, _BLOCK),
        ),
        return_lse=return_lse,
    )[:2]
    return Attended(out.transpose(1, 2), lse if return_lse else None)


@cache
def _causal() -> Any:
    """The mask inside a diagonal block, bottom-right aligned, in the package's own language."""
    import cutlass.cute as cute
    from flash_attn.cute import utils

    @cute.jit
    def causal(batch: Any, head: Any, query: Any, key: Any, lengths: Any, tensors: Any) -> Any:
        before = utils.scalar_to_ssa(lengths.seqlen_k - lengths.seqlen_q, query.dtype)
        return key <= query + before

    return causal
