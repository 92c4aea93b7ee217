"""PyTorch backend, for slices of query blocks and for one query."""

import torch
import torch.nn.functional as F

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.kernels.slices import slices
from sparse_patch.ops.layout import query_slots
from sparse_patch.ops.selection.compressed_keys.params import (
    BLOCK,
    COARSE,
    COARSE_PAGES,
    COLUMNS,
    LARGEST,
    CompressedKeysParams,
    pooled,
    seen,
)
from sparse_patch.ops.selection.top_pages.torch import top_pages
from sparse_patch.plans import BlockGrid, TokenBlockPlan


def choose(
    call: AttentionCall, k1: torch.Tensor, k2: torch.Tensor, rule: CompressedKeysParams, grid: BlockGrid, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries and counts of a `TokenBlockPlan`.

    Args:
        call: the attention call.
        k1: the fine compressed keys.
        k2: the coarse compressed keys.
        rule: how many blocks.
        grid: grid of blocks of 64 tokens.
        tile: tokens per tile.
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
    call: AttentionCall, k1: torch.Tensor, k2: torch.Tensor, rule: CompressedKeysParams, grid: BlockGrid, part: slice
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
    """Scores of blocks, float32 `[B, Hkv, S, N]`, for queries `[B, Hq, S, D]` that see `tokens` each."""
    grouped = q.float().unflatten(1, (call.k.shape[1], call.group_size))
    coarse = _logits(call, grouped, k2).masked_fill(~seen(tokens, k2.shape[2], COARSE)[:, None, None], -torch.inf)
    lse = coarse.logsumexp(-1, keepdim=True)
    weights = (_logits(call, grouped, k1) - lse.masked_fill(lse.isneginf(), torch.inf)).exp_()
    weights = weights.masked_fill_(~seen(tokens, k1.shape[2])[:, None, None], 0.0)
    return pooled(weights.sum(2).nan_to_num_(0.0, posinf=torch.inf), blocks)


def _logits(call: AttentionCall, grouped: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Float32 `[B, Hkv, G, S, n]`."""
    return apply_softcap(grouped @ keys.float().transpose(-1, -2)[:, :, None] * call.scale, call.softcap)


def block_scores(
    of_pages: torch.Tensor,
    lengths: torch.Tensor,
    kv_heads: int,
    scale: float,
    softcap: float | None,
    rule: CompressedKeysParams,
) -> torch.Tensor:
    """Scores of blocks for one query; see `ops.selection.compressed_keys.block_scores`.

    Args:
        of_pages: products of the query with the pages' mean keys, not scaled, float32 `[B, Hq, Np]`; `-inf` for pages
            without a real key.
        lengths: tokens of each row, int64 `[B]`.
        kv_heads: KV heads.
        scale: scale of the call.
        softcap: softcap of the call.
        rule: how many blocks.
    """
    number = -(-of_pages.shape[-1] // COLUMNS)
    logits = of_pages.masked_fill(of_pages.isneginf(), 0.0) * scale
    logits = F.pad(logits, (0, max(COARSE_PAGES - logits.shape[-1], 0)))
    fine = apply_softcap((logits[..., :-1] + logits[..., 1:]) / 2, softcap)
    coarse = apply_softcap(logits.unfold(-1, COARSE_PAGES, COARSE).mean(-1), softcap)
    lse = coarse.masked_fill(~seen(lengths, coarse.shape[-1], COARSE)[:, None], -torch.inf).logsumexp(-1, keepdim=True)
    weights = (fine - lse.masked_fill(lse.isneginf(), torch.inf)).exp()
    weights = weights.masked_fill(~seen(lengths, fine.shape[-1])[:, None], 0.0)
    scores = pooled(weights.unflatten(1, (kv_heads, -1)).sum(2), number).clamp(max=LARGEST)
    block = torch.arange(number, device=scores.device)
    own = ((lengths - 1) // BLOCK)[:, None, None]
    always = (block < rule.init_blocks) | ((block >= own - rule.local_blocks) & (block <= own))
    return scores.masked_fill(always, torch.inf)
