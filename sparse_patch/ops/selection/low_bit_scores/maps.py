"""Maps of decisions as bits: reading them, merging them into larger tiles, counting them."""

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.ops.selection.low_bit_scores.params import KEY_BLOCK, QUERY_TILE
from sparse_patch.plans import BlockGrid


def packed(bits: torch.Tensor) -> torch.Tensor:
    """Bits, bool `[..., 32 * words]`, as words, int32 `[..., words]`."""
    place = torch.arange(32, dtype=torch.int32, device=bits.device)
    return (bits.unflatten(-1, (-1, 32)).int() << place).sum(-1, dtype=torch.int32)


def unpacked(words: torch.Tensor) -> torch.Tensor:
    """Words, int32 `[..., words]`, as bits, bool `[..., 32 * words]`: for tests and pictures; 32 times as large."""
    place = torch.arange(32, dtype=torch.int32, device=words.device)
    return (((words[..., None] >> place) & 1) != 0).flatten(-2)


def tiles(words: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Decisions merged into the blocks of a grid of 64 or 128: a block is kept if any decision in it is.

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


def decided_pairs(words: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Causal (query, key) pairs of real tokens that the decisions themselves keep, int64 `[B, Hq]`.

    A plan computes whole blocks of 64 or 128, so it has more pairs. These pairs are the method's own, comparable with
    the density that its paper reports.
    """
    grid = BlockGrid.of(call, QUERY_TILE)
    begin, end = grid.query_bounds  # [B, NQ]
    tile = grid.query_block_ids * QUERY_TILE
    on_diagonal = -(-(end - tile) // KEY_BLOCK)  # blocks that begin in the tile's own queries; a map always has them
    below = _ones(words).sum(-1) - on_diagonal[:, None]
    triangle = (end - begin) * (begin + end + 1 - 2 * tile) // 2
    pairs = below * (KEY_BLOCK * (end - begin))[:, None] + triangle[:, None]
    return pairs.masked_fill_(~grid.has_queries[:, None], 0).sum(-1)


def _ones(words: torch.Tensor) -> torch.Tensor:
    """How many bits are set in each byte of the words, uint8: sums of neighbours, of pairs and of nibbles."""
    octets = words.contiguous().view(torch.uint8)
    octets = octets - ((octets >> 1) & 0x55)
    octets = (octets & 0x33) + ((octets >> 2) & 0x33)
    return (octets + (octets >> 4)) & 0x0F
