"""Blocks of keys for each block of queries: what most prefill methods decide."""

from dataclasses import dataclass

import torch

from sparse_patch.call import AttentionCall, causal_pairs
from sparse_patch.kernels.compaction import compact
from sparse_patch.plans.grid import BlockGrid
from sparse_patch.plans.lists import leading, marked
from sparse_patch.plans.plan import SparsePlan


@dataclass(frozen=True)
class BlockPlan(SparsePlan):
    """The key blocks to read for each (row, query head, query block), and single key columns beside them.

    Attributes:
        indices: int32 `[B, Hq, NQ, N]`; the first `counts` entries of a list are key blocks in ascending order, each at
            most once and none above the diagonal. The entries after them are undefined.
        counts: int32 `[B, Hq, NQ]`; 0 for the query blocks that a row does not have.
        grid: the grid that the indices refer to.
        columns: int32 `[B, Hq, NQ, C]`; the first `column_counts` entries of a list are keys, as positions within the
            row, each at most once, in none of the listed blocks and before the query block. None without columns.
        column_counts: int32 `[B, Hq, NQ]`, or None.
        pv_threshold: tiles whose logits lie this far below what was read before them, in log2 units, are left out
            (`ops.attention.block_sparse` says which tiles). At least 0; None leaves out no tile. Only a plan without
            columns may have it. `mask`, `density` and the plan's other numbers include these tiles.
        decided_pairs: causal pairs that the method decided to read, if it decides finer than in whole blocks, int64
            `[B, Hq]`; None if the blocks are its decision. For the report.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    grid: BlockGrid
    columns: torch.Tensor | None = None
    column_counts: torch.Tensor | None = None
    pv_threshold: float | None = None
    decided_pairs: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.pv_threshold is not None and self.columns is not None:
            raise ValueError("pv_threshold: a plan with single columns cannot have one")

    @classmethod
    def every(cls, call: AttentionCall, block_size: int) -> "BlockPlan":
        """Dense attention: every block up to the diagonal."""
        grid = BlockGrid.of(call, block_size)
        return cls.from_blocks(grid.causal[:, None].expand(-1, call.q.shape[1], -1, -1), grid)

    @classmethod
    def from_blocks(
        cls, blocks: torch.Tensor, grid: BlockGrid, columns: torch.Tensor | None = None, *, is_causal: bool = False
    ) -> "BlockPlan":
        """The plan of a map of blocks and of columns. Everything outside the causal triangle is dropped.

        Args:
            blocks: bool `[B, Hq, NQ, N]`.
            grid: their grid.
            columns: int64 `[B, Hq, C]`, keys as positions within the row, each at most once; a negative entry is no
                key. A query block reads the columns that come before it and lie in none of its blocks.
            is_causal: whether the map has nothing outside the triangle; this saves a copy of the map.
        """
        if not is_causal:
            blocks = blocks & grid.causal[:, None]
        key_block = torch.arange(blocks.shape[-1], dtype=torch.int32, device=blocks.device)
        indices, counts = compact(blocks, key_block.expand(blocks.shape))
        if columns is None:
            return cls(indices, counts, grid)
        block = (columns // grid.block_size).clamp(0, blocks.shape[-1] - 1)
        in_blocks = blocks.gather(-1, block[:, :, None].expand(-1, -1, blocks.shape[2], -1))
        key = columns.masked_fill(columns < 0, grid.kv_length)  # so it comes before no query block
        end = (grid.query_block_ids * grid.block_size).masked_fill(~grid.has_queries, 0)
        wanted = (key[:, :, None] < end[:, None, :, None]) & ~in_blocks
        return cls(indices, counts, grid, *compact(wanted, columns.int()[:, :, None].expand(wanted.shape)))

    @property
    def listed(self) -> torch.Tensor:
        """Which entries of `indices` are valid, bool `[B, Hq, NQ, N]`."""
        return leading(self.indices, self.counts)

    @property
    def on_diagonal(self) -> torch.Tensor:
        """Which lists end with the diagonal block of their query block, bool `[B, Hq, NQ]`."""
        last = self.indices.gather(-1, (self.counts.long() - 1).clamp(min=0)[..., None]).squeeze(-1)
        return (self.counts > 0) & (last == self.grid.query_block_ids[:, None])

    def blocks(self) -> torch.Tensor:
        """The plan's blocks as a map, bool `[B, Hq, NQ, N]`."""
        return marked(self.indices, self.counts, self.grid.num_key_blocks)

    def mask(self) -> torch.Tensor:
        """The plan as a mask of tokens, bool `[B, Hq, Sq, Skv]`: for the oracle and for pictures, N x N large."""
        grid, device = self.grid, self.indices.device
        query = torch.arange(grid.q_start, grid.q_start + grid.q_length, device=device) - grid.row_starts[:, None]
        key = torch.arange(grid.kv_length, device=device) - grid.row_starts[:, None]
        query_block = query.clamp(min=0) // grid.block_size - grid.query_block_ids[:, :1]
        key_block = key.clamp(min=0) // grid.block_size
        rows = torch.arange(grid.batch, device=device)[:, None, None]
        tokens = self.blocks().permute(0, 2, 3, 1)[rows, query_block[:, :, None], key_block[:, None, :]]
        if self.columns is not None and self.column_counts is not None:
            single = marked(self.columns, self.column_counts, grid.kv_length).permute(0, 2, 3, 1)
            tokens = tokens | single[rows, query_block[:, :, None], key.clamp(min=0)[:, None, :]]
        causal = (key[:, None, :] <= query[:, :, None]) & (key[:, None, :] >= 0)
        return tokens.permute(0, 3, 1, 2) & causal[:, None]

    def computed_pairs(self) -> torch.Tensor:
        """Causal (query, key) pairs of real tokens that the plan computes, int64 `[B, Hq]`."""
        begin, end = (bound[:, None] for bound in self.grid.query_bounds)
        block_start = self.grid.query_block_ids[:, None] * self.grid.block_size
        on_diagonal = self.on_diagonal
        below = (self.counts - on_diagonal.int()) * (end - begin) * self.grid.block_size
        # sum of (query - block_start + 1) over the real queries of the block
        triangle = (end - begin) * (begin + end + 1 - 2 * block_start) // 2
        pairs = below + on_diagonal * triangle
        if self.column_counts is not None:
            pairs = pairs + self.column_counts * (end - begin)
        return pairs.sum(-1)

    def causal_pairs(self) -> torch.Tensor:
        """See `SparsePlan.causal_pairs`."""
        return causal_pairs(self.grid.q_start, self.grid.kv_length, self.grid.row_starts)

    def block_map(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SparsePlan.block_map`."""
        return self.blocks()[0, head].cpu(), self.grid.causal[0].cpu()
