"""Cutting tensors into the blocks of a `BlockGrid`, each row of a padded batch from its own first token."""

import torch
import torch.nn.functional as F

from sparse_patch.plans import BlockGrid


def key_blocks(x: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Keys or values `[B, Hkv, Skv, D]` as `[B, Hkv, N, block, D]`, each row from its first real key; zeros follow."""
    slots = grid.num_key_blocks * grid.block_size
    if grid.padded:
        position = torch.arange(slots, device=x.device) + grid.row_starts[:, None]
        x = _take(x, position, position < grid.kv_length)
    elif slots != grid.kv_length:
        x = F.pad(x, (0, 0, 0, slots - grid.kv_length))
    return x.reshape(*x.shape[:2], grid.num_key_blocks, grid.block_size, x.shape[-1])


def query_blocks(q: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Queries `[B, Hq, Sq, D]` as `[B, Hq, NQ, block, D]`; slots with no real query are zeros."""
    slots = query_slots(q, grid, 0, grid.num_query_blocks * grid.block_size)
    return slots.reshape(*q.shape[:2], grid.num_query_blocks, grid.block_size, q.shape[-1])


def query_slots(q: torch.Tensor, grid: BlockGrid, begin: int, end: int) -> torch.Tensor:
    """Slots `begin` to `end - 1` of the query blocks, laid one after another: `[B, Hq, end - begin, D]`."""
    if grid.padded or not grid.aligned:
        return _take(q, grid.query_index.flatten(1)[:, begin:end], grid.query_is_real.flatten(1)[:, begin:end])
    q = q[:, :, begin:end]
    return q if q.shape[2] == end - begin else F.pad(q, (0, 0, 0, end - begin - q.shape[2]))


def merge_query_blocks(blocks: torch.Tensor, grid: BlockGrid, padding: float = 0.0) -> torch.Tensor:
    """The inverse of `query_blocks`: `[B, Hq, NQ, block, ...]` as `[B, Hq, Sq, ...]`, `padding` for padding queries."""
    flat = blocks.flatten(2, 3)  # a view, whatever the layout
    if not grid.padded and grid.aligned:
        return flat[:, :, : grid.q_length]
    query = torch.arange(grid.q_start, grid.q_start + grid.q_length, device=blocks.device)
    in_row = query - grid.row_starts[:, None]
    slot = in_row - grid.query_block_ids[:, :1] * grid.block_size
    return _take(flat, slot, in_row >= 0, padding)


def _take(x: torch.Tensor, position: torch.Tensor, valid: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
    """For `x` `[B, H, S, ...]`: `x[b, :, position[b, t]]` where `valid[b, t]`, else `fill`; `[B, H, T, ...]`."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    taken = x.transpose(1, 2)[rows, position.clamp(0, x.shape[2] - 1)].transpose(1, 2)
    return taken.masked_fill(~valid.view(valid.shape[0], 1, valid.shape[1], *(1,) * (x.ndim - 3)), fill)
