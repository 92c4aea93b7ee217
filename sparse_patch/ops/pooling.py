"""Attention of mean queries to mean keys, block by block: a cheap estimate that block-selecting methods rank by."""

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.layout import key_blocks, query_blocks
from sparse_patch.plans import BlockGrid


def mean_keys(call: AttentionCall, grid: BlockGrid) -> torch.Tensor:
    """Mean key of each block, over the keys it really has, float32 `[B, Hkv, N, D]`."""
    last = grid.lengths[:, None] - torch.arange(grid.num_key_blocks, device=call.k.device) * grid.block_size
    count = last.clamp(1, grid.block_size)[:, None, :, None]
    return key_blocks(call.k, grid).float().sum(-2) / count


def pooled_attention(call: AttentionCall, grid: BlockGrid, pooled_k: torch.Tensor) -> torch.Tensor:
    """Causal attention of mean queries to mean keys, float32 `[B, Hq, NQ, N]`; query blocks a row lacks are 0."""
    begin, end = grid.query_bounds
    count = (end - begin).clamp(min=1)[:, None, :, None]
    mean_q = query_blocks(call.q, grid).float().sum(-2) / count
    logits = pooled_logits(mean_q, pooled_k, call).masked_fill(~grid.causal[:, None], -torch.inf)
    return logits.softmax(-1).masked_fill(~grid.causal[:, None], 0.0)


def pooled_logits(mean_q: torch.Tensor, pooled_k: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Logits of mean queries `[B, Hq, I, D]` against mean keys `[B, Hkv, N, D]`: `[B, Hq, I, N]`."""
    grouped = (mean_q * call.scale).unflatten(1, (-1, call.group_size))
    logits = grouped @ pooled_k.transpose(-1, -2)[:, :, None]
    return apply_softcap(logits.flatten(1, 2), call.softcap)
