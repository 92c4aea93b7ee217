"""Maps of decisions as bits: reading them, merging them into larger tiles, their density."""

import torch

from sparse_patch.call import AttentionCall, causal_pairs
from sparse_patch.ops.scores.rules import KEY_BLOCK, QUERY_TILE
from sparse_patch.ops.slices import slices
from sparse_patch.plans import BlockGrid


def packed(bits: torch.Tensor) -> torch.Tensor:
    """Bits, bool `[..., 32 * words]`, as words, int32 `[..., words]`."""
    place = torch.arange(32, dtype=torch.int32, device=bits.device)
    return (bits.unflatten(-1, (-1, 32)).int() << place).sum(-1, dtype=torch.int32)


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """Words, int32 `[..., words]`, as bits, bool `[..., 32 * words]`: for tests and pictures, 32 times as large."""
    place = torch.arange(32, dtype=torch.int32, device=words.device)
    return (((words[..., None] >> place) & 1) != 0).flatten(-2)


def tiles(words: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Decisions merged into the blocks of a grid of 64 or 128: a block that any decision in it keeps.

    Args:
        words: the map of a call, int32 `[B, Hq, NQ of 64, words]`.
        grid: the call's grid of larger blocks.

    Returns:
        Bool `[B, Hq, NQ, N]`.
    """
    merged = _rows(words, grid)
    bits = grid.block_size // KEY_BLOCK  # decisions of a block within a byte
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
    # The bytes of a word are in the order of its bits, lowest first.
    parts = (merged.contiguous().view(torch.uint8)[..., None] >> shift) & (1 << bits) - 1
    return parts.flatten(-2)[..., : grid.num_key_blocks] != 0


def _rows(words: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """The query tiles that make up each query block of the grid, merged: int32 `[B, Hq, NQ, words]`."""
    per_block = grid.block_size // QUERY_TILE
    if per_block == 1:
        return words
    first_tile = grid.first_query // QUERY_TILE
    merged = None
    for step in range(per_block):
        tile = grid.query_block_ids * per_block + step - first_tile[:, None]  # [B, NQ]
        there = (tile >= 0) & (tile < words.shape[2])
        index = tile.clamp(0, words.shape[2] - 1)[:, None, :, None].expand(-1, words.shape[1], -1, words.shape[3])
        part = words.gather(2, index).masked_fill_(~there[:, None, :, None], 0)
        merged = part if merged is None else merged.bitwise_or_(part)
    assert merged is not None
    return merged


def decided_density(words: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Share of the causal triangle that the decisions themselves keep, float32 `[B, Hq]`.

    A plan computes whole blocks of 64 or 128, so its density is higher: this one is the method's, comparable with the
    figures of its paper. For measurements; not on the path of a call.
    """
    grid = BlockGrid.of(call, QUERY_TILE)
    first_key = torch.arange(words.shape[-1] * 32, device=words.device) * KEY_BLOCK
    batch, heads, num_tiles, _ = words.shape
    kept = torch.zeros(batch, heads, dtype=torch.int64, device=words.device)
    for part in slices(num_tiles, 16 * batch * heads * len(first_key)):
        begin, end = (bound[:, part, None] for bound in grid.query_bounds)  # [B, tiles, 1]
        # Query i reads min(i + 1 - first_key, 32) keys of a block: a ramp, then the whole block.
        pairs = _ramp(end - first_key) - _ramp(begin - first_key)
        kept += (unpacked(words[:, :, part]) * pairs[:, None]).sum((-1, -2))
    causal = causal_pairs(grid.q_start, grid.kv_length, grid.row_starts)
    return kept.float() / causal[:, None].clamp(min=1).float()


def _ramp(queries: torch.Tensor) -> torch.Tensor:
    """Pairs of the first `queries` queries, counted from a block's first key, with the keys of the block."""
    on_ramp = queries.clamp(0, KEY_BLOCK)
    return on_ramp * (on_ramp + 1) // 2 + (queries - KEY_BLOCK).clamp(min=0) * KEY_BLOCK
