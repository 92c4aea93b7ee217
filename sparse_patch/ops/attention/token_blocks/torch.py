"""PyTorch backend: gathers the blocks that any query of a query block reads, so it saves time on a CPU too."""

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.layout import key_blocks, merge_query_blocks, query_blocks
from sparse_patch.plans import TokenBlockPlan


def attend(call: AttentionCall, plan: TokenBlockPlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.token_blocks.attend`. Reads the plan on the host: meant for the CPU, correct on any device."""
    grid, group = plan.grid, call.group_size
    k, v = key_blocks(call.k, grid).float(), key_blocks(call.v, grid).float()  # [B, Hkv, N, block, D]
    q = query_blocks(call.q, grid).float().unflatten(1, (k.shape[1], group))
    # Laid out in memory as [B, Sq, Hq, Dv], which Transformers expects.
    out = q.new_zeros(len(q), grid.num_query_blocks, grid.block_size, plan.heads, v.shape[-1]).permute(0, 3, 1, 2, 4)
    lse = q.new_full(out.shape[:-1], -torch.inf) if return_lse else None
    in_block = torch.arange(grid.block_size, device=q.device)
    diagonal = grid.query_block_ids.tolist()
    blocks = plan.blocks()
    any_query = blocks.any(3)
    for b, h, i in any_query.any(-1).nonzero().tolist():
        read = any_query[b, h, i].nonzero().flatten()
        mask = blocks[b, h, i][:, read].repeat_interleave(grid.block_size, 1)  # [block, keys]
        if read[-1] == diagonal[b][i]:
            mask[:, -grid.block_size :] &= in_block[:, None] >= in_block
        logits = apply_softcap(q[b, h, :, i] @ k[b, h, read].flatten(0, 1).t() * call.scale, call.softcap)
        logits = logits.masked_fill_(~mask, -torch.inf)  # [G, block, keys]
        heads = slice(h * group, (h + 1) * group)
        if lse is not None:
            lse[b, heads, i] = logits.logsumexp(-1)
        # NaN in slots without a query; these slots are not taken.
        out[b, heads, i] = torch.softmax(logits, -1) @ v[b, h, read].flatten(0, 1)
    merged_lse = None if lse is None else merge_query_blocks(lse, grid, -torch.inf)
    return Attended(merge_query_blocks(out, grid).to(call.q.dtype), merged_lse)
