"""Blocks of keys for each token: what InfLLM-V2 decides."""

from dataclasses import dataclass

import torch

from sparse_patch.call import causal_pairs
from sparse_patch.kernels.compaction import compact
from sparse_patch.plans.grid import BlockGrid
from sparse_patch.plans.lists import leading
from sparse_patch.plans.once import once
from sparse_patch.plans.plan import SparsePlan

BLOCK_BITS = 8  # bits of a `TokenBlockPlan` entry that say which tokens of a tile read the block


@dataclass(frozen=True)
class TokenBlockPlan(SparsePlan):
    """The key blocks to read for each (row, KV head, query). All query heads of a KV head read the same blocks.

    A query in block `I` of its row reads the first `init_blocks` blocks, the blocks `I - local_blocks ... I` up to
    itself, and the blocks in between that are listed for it. A query in one of the first `dense_blocks` blocks
    reads every key before it.

    A tile of neighbouring queries, which choose similar blocks, shares one list. Query blocks lie on the grid, and
    tile `t` of a row holds the `tile` positions from `query_block_ids[b, 0] * B + t * tile` on.

    Attributes:
        entries: int32 `[B, Hkv, NT, C]`; the first `counts` entries of a list are valid, in ascending order. `entry >>
            BLOCK_BITS` is a key block, listed at most once. Bit `i` of the entry says whether query `i` of the tile
            reads the block; at least one query does. Entries have only real queries, and only blocks that these
            queries do not always read.
        counts: int32 `[B, Hkv, NT]`.
        grid: the grid of the blocks.
        tile: queries per tile: a power of two, at most `BLOCK_BITS`.
        heads: query heads, Hq.
        init_blocks: see above.
        local_blocks: see above.
        dense_blocks: see above.
    """

    entries: torch.Tensor
    counts: torch.Tensor
    grid: BlockGrid
    tile: int
    heads: int
    init_blocks: int
    local_blocks: int
    dense_blocks: int

    @staticmethod
    def packed(blocks: torch.Tensor, real: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries and counts of chosen blocks.

        Args:
            blocks: bool `[B, Hkv, NQ, block, N]`: by query block, query in the block and key block.
            real: bool `[B, NQ, block]`, see `BlockGrid.query_is_real`.
            tile: queries per tile.
        """
        of_tiles = (blocks & real[:, None, ..., None]).flatten(2, 3).unflatten(2, (-1, tile))
        bit = torch.arange(tile, dtype=torch.int32, device=blocks.device)[:, None]
        readers = (of_tiles.int() << bit).sum(3, dtype=torch.int32)
        number = torch.arange(blocks.shape[-1], dtype=torch.int32, device=blocks.device)
        return compact(readers != 0, (number << BLOCK_BITS) | readers)

    def blocks(self) -> torch.Tensor:
        """The blocks that each query reads, including its own, as a map: bool `[B, Hkv, NQ, block, N]`."""
        grid = self.grid
        readers = self.entries.new_zeros(*self.counts.shape, grid.num_key_blocks + 1)
        target = torch.where(leading(self.entries, self.counts), self.entries >> BLOCK_BITS, grid.num_key_blocks)
        readers = readers.scatter_(-1, target.long(), self.entries & ((1 << BLOCK_BITS) - 1))[..., None, :-1]
        bit = torch.arange(self.tile, dtype=torch.int32, device=readers.device)[:, None]
        listed = (readers >> bit & 1).bool().flatten(2, 3).unflatten(2, (-1, grid.block_size))
        begin, low = self._between
        number = torch.arange(grid.num_key_blocks, device=readers.device)
        between = (number >= begin[..., None]) & (number < low[..., None])
        in_any_case = (number <= grid.query_block_ids[..., None]) & ~between  # [B, NQ, N]
        return (listed | in_any_case[:, None, :, None]) & grid.query_is_real[:, None, ..., None]

    def mask(self) -> torch.Tensor:
        """The plan as a mask of tokens, bool `[B, Hq, Sq, Skv]`: for the oracle and for pictures, N x N large."""
        grid, device = self.grid, self.entries.device
        query = torch.arange(grid.q_start, grid.q_start + grid.q_length, device=device) - grid.row_starts[:, None]
        key = torch.arange(grid.kv_length, device=device) - grid.row_starts[:, None]
        slot = (query - grid.query_block_ids[:, :1] * grid.block_size).clamp(min=0)
        rows = torch.arange(grid.batch, device=device)[:, None, None]
        by_query = self.blocks().flatten(2, 3).permute(0, 2, 3, 1)  # [B, slots, N, Hkv]
        tokens = by_query[rows, slot[:, :, None], (key.clamp(min=0) // grid.block_size)[:, None, :]]
        causal = (key[:, None, :] <= query[:, :, None]) & (key[:, None, :] >= 0)
        of_kv_heads = tokens.permute(0, 3, 1, 2) & causal[:, None]
        return of_kv_heads.repeat_interleave(self.heads // of_kv_heads.shape[1], 1)

    def computed_pairs(self) -> torch.Tensor:
        """Causal (query, key) pairs of real tokens that the plan reads, int64 `[B, Hq]`."""
        grid = self.grid
        begin, low = self._between
        position = grid.query_block_ids[..., None] * grid.block_size + torch.arange(
            grid.block_size, device=self.entries.device
        )
        in_any_case = position + 1 - ((low - begin) * grid.block_size)[..., None]  # [B, NQ, block]
        in_any_case = (in_any_case * grid.query_is_real).flatten(1).sum(-1)
        entries = self.entries * leading(self.entries, self.counts)
        listed = torch.stack([(entries >> i & 1).sum((-1, -2)) for i in range(self.tile)]).sum(0) * grid.block_size
        pairs = in_any_case[:, None] + listed
        return pairs.repeat_interleave(self.heads // pairs.shape[1], 1)

    def causal_pairs(self) -> torch.Tensor:
        """See `SparsePlan.causal_pairs`."""
        return causal_pairs(self.grid.q_start, self.grid.kv_length, self.grid.row_starts)

    def block_map(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SparsePlan.block_map`. A query block reads the blocks that any of its queries reads."""
        kv_head = head * self.counts.shape[1] // self.heads
        return self.blocks()[0, kv_head].any(1).cpu(), self.grid.causal[0].cpu()

    @once
    def _between(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`listable_blocks` of the query blocks, int64 `[B, NQ]` each."""
        return listable_blocks(self.grid.query_block_ids, self.init_blocks, self.local_blocks, self.dense_blocks)


def listable_blocks(
    block: torch.Tensor, init_blocks: int, local_blocks: int, dense_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last-plus-one block that may be listed for queries in `block`, both like `block`; see the plan."""
    low = (block - local_blocks).clamp(min=0).masked_fill(block < dense_blocks, 0)
    return low.clamp(max=init_blocks), low
