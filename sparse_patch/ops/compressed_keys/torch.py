"""PyTorch backend: slices of query blocks."""

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.compressed_keys.rules import BLOCK, COARSE, BlockRule, pooled, seen
from sparse_patch.ops.layout import query_slots
from sparse_patch.ops.slices import slices
from sparse_patch.ops.top_pages.torch import top_pages
from sparse_patch.plans import BlockGrid, TokenBlockPlan


def choose(
    call: AttentionCall, k1: torch.Tensor, k2: torch.Tensor, rule: BlockRule, grid: BlockGrid, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries and counts of a `TokenBlockPlan`.

    Args:
        call: the attention call.
        k1: the fine compressed keys.
        k2: the coarse ones.
        rule: how many blocks.
        grid: of blocks of 64.
        tile: tokens of a tile.
    """
    each = 8 * len(call.q) * call.q.shape[1] * BLOCK * k1.shape[2]
    parts = [
        TokenBlockPlan.packed(_chosen(call, k1, k2, rule, grid, part), grid.query_is_real[:, part], tile)
        for part in slices(grid.num_query_blocks, each)
    ]
    size = min(tile * rule.chosen, grid.num_key_blocks)
    entries = torch.cat([entries[..., :size] for entries, _ in parts], 2)
    return entries, torch.cat([counts for _, counts in parts], 2)


def _chosen(
    call: AttentionCall, k1: torch.Tensor, k2: torch.Tensor, rule: BlockRule, grid: BlockGrid, part: slice
) -> torch.Tensor:
    """The blocks that the tokens of some query blocks choose, bool `[B, Hkv, blocks, 64, N]`."""
    q = query_slots(call.q, grid, part.start * BLOCK, part.stop * BLOCK)
    block = grid.query_block_ids[:, part]
    tokens = (block[..., None] * BLOCK + torch.arange(1, BLOCK + 1, device=q.device)).flatten(1)  # [B, S]: seen
    scores = _scores(call, q, k1, k2, tokens, grid.num_key_blocks)  # [B, Hkv, S, N]
    begin, low = rule.candidates(block)
    number = torch.arange(grid.num_key_blocks, device=q.device)
    candidate = ((number >= begin[..., None]) & (number < low[..., None])).repeat_interleave(BLOCK, 1)[:, None]
    lists = scores.masked_fill(~candidate, -torch.inf).flatten(1, 2)
    limits = block.new_full(lists.shape[:2], grid.num_key_blocks)
    best, _ = top_pages(lists, limits, min(rule.chosen, grid.num_key_blocks))
    chosen = torch.zeros_like(lists, dtype=torch.bool).scatter_(-1, best.long(), True).view(scores.shape)
    return (chosen & candidate).unflatten(2, (-1, BLOCK))


def _scores(
    call: AttentionCall, q: torch.Tensor, k1: torch.Tensor, k2: torch.Tensor, tokens: torch.Tensor, blocks: int
) -> torch.Tensor:
    """Scores of blocks, float32 `[B, Hkv, S, N]`, for queries `[B, Hq, S, D]` that see so many tokens each."""
    grouped = q.float().unflatten(1, (call.k.shape[1], call.group_size))
    coarse = _logits(call, grouped, k2).masked_fill(~seen(tokens, k2.shape[2], COARSE)[:, None, None], -torch.inf)
    lse = coarse.logsumexp(-1, keepdim=True)
    weights = (_logits(call, grouped, k1) - lse.masked_fill(lse.isneginf(), torch.inf)).exp_()
    weights = weights.masked_fill_(~seen(tokens, k1.shape[2])[:, None, None], 0.0)
    return pooled(weights.sum(2).nan_to_num_(0.0, posinf=torch.inf), blocks)


def _logits(call: AttentionCall, grouped: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Float32 `[B, Hkv, G, S, n]`."""
    return apply_softcap(grouped @ keys.float().transpose(-1, -2)[:, :, None] * call.scale, call.softcap)
