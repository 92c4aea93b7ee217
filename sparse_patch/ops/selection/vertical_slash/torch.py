"""PyTorch backend of the lines."""

import torch
import torch.nn.functional as F

from sparse_patch.call import AttentionCall
from sparse_patch.ops.selection.last_queries.torch import last_query_profiles
from sparse_patch.ops.selection.pooling import pooled_attention, pooled_logits
from sparse_patch.ops.selection.vertical_slash.params import QueryAware, VerticalSlashParams
from sparse_patch.plans import BlockGrid, BlockPlan

_TOKENS_PER_LINE = 128  # as in FlexPrefill's public code, whatever the block size is


def choose_vertical_slash(
    call: AttentionCall, grid: BlockGrid, mean_k: torch.Tensor, rule: VerticalSlashParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.selection.vertical_slash`."""
    by_key, by_distance = last_query_profiles(call, grid.block_size)
    key_mass = _pool(by_key, grid, grid.row_starts)
    distance_mass = _pool(by_distance, grid, torch.zeros_like(grid.tail) if rule.reach else -grid.tail)
    estimate = _estimate_last_block(call, grid, mean_k)
    distance = _js_distance(estimate, key_mass, grid.has_key_block[:, None], zero_is_nan=not rule.reach)
    query_aware = distance < rule.tau
    verticals = _choose(key_mass, by_key, query_aware, grid, rule)
    slashes = _choose(distance_mass, by_distance, query_aware, grid, rule)
    if rule.reach:
        slashes = slashes | F.pad(slashes, (1, -1))
    return verticals | (grid.lengths <= rule.dense_length)[:, None, None], slashes, query_aware


def plan_of_vertical_slash(
    verticals: torch.Tensor, slashes: torch.Tensor, aware: QueryAware | None, grid: BlockGrid
) -> BlockPlan:
    """See `ops.selection.vertical_slash`."""
    blocks = verticals[:, :, None] | grid.on_diagonals(slashes)
    if aware is not None:
        blocks = blocks | (_aware_blocks(aware, grid) & aware.heads[..., None, None])
    return BlockPlan.from_blocks(blocks, grid)


def _aware_blocks(aware: QueryAware, grid: BlockGrid) -> torch.Tensor:
    """The blocks that every head would take, bool `[B, Hq, NQ, N]`."""
    attention = pooled_attention(aware.call, grid, aware.mean_k)
    shape = attention.shape
    if not aware.each_row:  # one sort over all rows of the head
        attention = attention.flatten(-2)
    ranked, order = attention.sort(dim=-1, descending=True, stable=True)
    reached = ranked.cumsum(-1)
    if aware.each_row:
        taken = reached - ranked < aware.gamma
        if aware.max_blocks is not None:
            taken[..., aware.max_blocks :] = False
    else:
        taken = reached <= aware.gamma * grid.has_queries.sum(-1)[:, None, None]
    return torch.zeros_like(taken).scatter(-1, order, taken).view(shape)


def _choose(
    mass: torch.Tensor, token_mass: torch.Tensor, query_aware: torch.Tensor, grid: BlockGrid, rule: VerticalSlashParams
) -> torch.Tensor:
    """The lines to take, bool `[B, Hq, N]`, from their `mass` `[B, Hq, N]`."""
    ranked = mass.masked_fill(~grid.has_key_block[:, None], -1.0)
    ranked[..., 0] = torch.inf
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    if rule.reach:
        wanted = _number_reaching(mass.gather(-1, order), rule.gamma)
    else:
        wanted = tokens_within(token_mass, rule.gamma) // _TOKENS_PER_LINE + 1
    wanted = wanted.masked_fill(query_aware, rule.min_blocks).clamp(rule.min_blocks, rule.max_blocks)
    wanted = torch.minimum(wanted, grid.key_blocks_per_row[:, None])
    taken = torch.arange(mass.shape[-1], device=mass.device) < wanted[..., None]
    return torch.zeros_like(taken).scatter(-1, order, taken)


def _estimate_last_block(call: AttentionCall, grid: BlockGrid, mean_k: torch.Tensor) -> torch.Tensor:
    """Attention over key blocks of the mean of the last `block` queries, float32 `[B, Hq, N]`."""
    mean_q = call.q[:, :, -grid.block_size :].float().mean(-2, keepdim=True)
    logits = pooled_logits(mean_q, mean_k, call).squeeze(-2)
    return logits.masked_fill(~grid.has_key_block[:, None], -torch.inf).softmax(-1)


def _js_distance(p: torch.Tensor, q: torch.Tensor, exists: torch.Tensor, zero_is_nan: bool) -> torch.Tensor:
    """Square root of the Jensen-Shannon divergence over the last axis where `exists`, in nats.

    With `zero_is_nan`, a zero probability gives NaN (0 * log 0), which is below no threshold, as in the public code.
    """
    middle = (p + q) / 2
    if zero_is_nan:
        terms = p * (p / middle).log() + q * (q / middle).log()
    else:
        middle = middle.clamp(min=torch.finfo(middle.dtype).tiny)
        terms = torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)
    return (terms.masked_fill(~exists, 0.0).sum(-1) / 2).clamp(min=0).sqrt()


def tokens_within(mass: torch.Tensor, gamma: float) -> torch.Tensor:
    """1 + how many of the largest entries of `mass` `[..., n]` have a sum of at most `gamma`, int64 `[...]`."""
    return (mass.sort(-1, descending=True).values.cumsum(-1) <= gamma).sum(-1) + 1


def _number_reaching(ranked: torch.Tensor, gamma: float) -> torch.Tensor:
    """Number of leading entries until their sum is at least `gamma`, int64 `[...]`."""
    return (ranked.cumsum(-1) - ranked < gamma).sum(-1)


def _pool(profile: torch.Tensor, grid: BlockGrid, offset: torch.Tensor) -> torch.Tensor:
    """Sums of `profile` `[B, Hq, n]` over blocks that begin at entry `offset[b]`, 0 outside: `[B, Hq, N]`."""
    index = torch.arange(grid.num_key_blocks * grid.block_size, device=profile.device) + offset[:, None]
    inside = (index >= 0) & (index < profile.shape[-1])
    index = index.clamp(0, profile.shape[-1] - 1)[:, None].expand(-1, profile.shape[1], -1)
    taken = profile.gather(-1, index).masked_fill(~inside[:, None], 0.0)
    return taken.unflatten(-1, (grid.num_key_blocks, grid.block_size)).sum(-1)
