"""The oracle: a float32 softmax under the plan's token mask. It is slow and N x N large, but obviously right."""

import math
from collections.abc import Sequence

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.attention.block_sparse.tiles import tile_side
from sparse_patch.ops.attention.op import Attended
from sparse_patch.plans import BlockPlan


def attend(call: AttentionCall, plan: BlockPlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.block_sparse.attend`."""
    k = call.k.float().repeat_interleave(call.group_size, dim=1)
    v = call.v.float().repeat_interleave(call.group_size, dim=1)
    logits = apply_softcap(call.q.float() @ k.transpose(-1, -2) * call.scale, call.softcap)
    logits = logits.masked_fill(~plan.mask(), -torch.inf)
    if plan.pv_threshold is not None:
        logits = logits.masked_fill(_left_out(logits, plan, plan.pv_threshold), -torch.inf)
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse.isneginf(), 0.0)[..., None])
    return Attended((weights @ v).to(call.q.dtype), lse if return_lse else None)


def _left_out(logits: torch.Tensor, plan: BlockPlan, threshold: float) -> torch.Tensor:
    """What the plan's `pv_threshold` leaves out, bool, shaped like the masked logits `[B, Hq, Sq, Skv]`."""
    grid, side = plan.grid, tile_side(plan.grid.block_size)
    left_out = torch.zeros_like(logits, dtype=torch.bool)
    for row, start in enumerate(grid.row_starts.tolist()):
        first, length = max(grid.q_start - start, 0), grid.kv_length - start
        for top in range(first // side * side, length, side):  # positions within the row, like everything here
            queries = slice(max(top, first) + start - grid.q_start, min(top + side, length) + start - grid.q_start)
            tiles = logits[row, :, queries, start : start + top + side].split(side, -1)
            for key, far in zip(range(start, grid.kv_length, side), _far_tiles(tiles, threshold), strict=False):
                left_out[row, :, queries, key : key + side] = far[:, None, None]
    return left_out


def _far_tiles(tiles: Sequence[torch.Tensor], threshold: float) -> list[torch.Tensor]:
    """Which tiles `[Hq, queries, keys]` are left out, bool `[Hq]` each, in order; logits not planned are `-inf`."""
    planned = torch.stack([tile.isfinite().flatten(1).any(-1) for tile in tiles])
    largest, far = tiles[0].new_full(tiles[0].shape[:2], -torch.inf), []
    for number, tile in enumerate(tiles):
        of_tile = tile.amax(-1)
        above = of_tile - largest + threshold * math.log(2)  # infinite in the first planned tile, NaN before it
        is_last = ~planned[number + 1 :].any(0)
        far.append((above <= 0).all(-1) & ~is_last)
        largest = torch.maximum(largest, of_tile)
    return far
