"""Attention of mean queries to mean keys, block by block: a cheap estimate by which methods rank blocks."""

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.selection.block_means import query_means
from sparse_patch.plans import BlockGrid


def pooled_attention(call: AttentionCall, grid: BlockGrid, mean_k: torch.Tensor) -> torch.Tensor:
    """Causal attention of mean queries to mean keys, float32 `[B, Hq, NQ, N]`; missing query blocks are 0."""
    logits = pooled_logits(query_means(call.q, grid), mean_k, call).masked_fill(~grid.causal[:, None], -torch.inf)
    return logits.softmax(-1).masked_fill(~grid.causal[:, None], 0.0)


def pooled_logits(mean_q: torch.Tensor, mean_k: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Logits of mean queries `[B, Hq, I, D]` against mean keys `[B, Hkv, N, D]`: `[B, Hq, I, N]`."""
    grouped = (mean_q * call.scale).unflatten(1, (-1, call.group_size))
    logits = grouped @ mean_k.transpose(-1, -2)[:, :, None]
    return apply_softcap(logits.flatten(1, 2), call.softcap)


def mean_of_rows(means: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean of each row, float32 `[B, H, D]`, from block means `[B, H, N, D]` of `tokens` each, int64 `[B, N]`."""
    share = tokens.float() / tokens.sum(-1, keepdim=True).clamp(min=1).float()
    return (means * share[:, None, :, None]).sum(-2)
