"""The grid of blocks that a call is cut into."""

from dataclasses import dataclass

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.plans.once import once


@dataclass(frozen=True)
class BlockGrid:
    """The grid of square blocks that a call is cut into. Each row of the batch begins at its own first key.

    Key block `J` of row `b` holds the keys `kv_start[b] + J*B ... + B-1`. Query blocks lie on the same grid, so the
    diagonal block of query block `I` is key block `I`. In a chunk that begins inside a block, the first query block is
    partial. Row `b` has the query blocks `first_block[b] + 0, 1, ...`. Because rows count from their own start, a
    left-padded row is cut exactly as the same row alone.
    """

    batch: int
    q_length: int
    kv_length: int
    q_start: int
    row_starts: torch.Tensor
    padded: bool
    block_size: int

    @classmethod
    def of(cls, call: AttentionCall, block_size: int) -> "BlockGrid":
        return cls(
            batch=call.q.shape[0],
            q_length=call.q.shape[2],
            kv_length=call.kv_length,
            q_start=call.q_start,
            row_starts=call.row_starts(),
            padded=call.kv_start is not None,
            block_size=block_size,
        )

    @property
    def aligned(self) -> bool:
        """Whether every row's query blocks begin at the first query of the call."""
        return self.q_start % self.block_size == 0 and (not self.padded or self.q_start == 0)

    @property
    def num_key_blocks(self) -> int:
        """Key blocks of the longest possible row, N."""
        return -(-self.kv_length // self.block_size)

    @property
    def num_query_blocks(self) -> int:
        """The most query blocks that a row can have, NQ (a Python int, whatever the padding)."""
        if not self.padded:
            return self.num_key_blocks - self.q_start // self.block_size
        worst = -(-self.q_length // self.block_size) + (self.q_start > 0)
        return min(worst, self.num_key_blocks)

    def visible_key_blocks(self, query_blocks: int) -> int:
        """The most key blocks that the first `query_blocks` query blocks of a row can see (a Python int)."""
        return min(self.q_start // self.block_size + query_blocks, self.num_key_blocks)

    @once
    def lengths(self) -> torch.Tensor:
        """Real keys of each row, int64 `[B]`."""
        return self.kv_length - self.row_starts

    @once
    def key_blocks_per_row(self) -> torch.Tensor:
        """Key blocks of each row, int64 `[B]`."""
        return -(-self.lengths // self.block_size)

    @once
    def tail(self) -> torch.Tensor:
        """Tokens missing in each row's last key block, int64 `[B]`."""
        return self.key_blocks_per_row * self.block_size - self.lengths

    @once
    def key_block_tokens(self) -> torch.Tensor:
        """Real keys of each key block, int64 `[B, N]`; 0 for blocks that a row does not have."""
        begin = torch.arange(self.num_key_blocks, device=self.row_starts.device) * self.block_size
        return (self.lengths[:, None] - begin).clamp(0, self.block_size)

    @once
    def has_key_block(self) -> torch.Tensor:
        """Which key blocks each row has, bool `[B, N]`."""
        key_block = torch.arange(self.num_key_blocks, device=self.row_starts.device)
        return key_block < self.key_blocks_per_row[:, None]

    @once
    def first_query(self) -> torch.Tensor:
        """Position, within its row, of each row's first real query, int64 `[B]`."""
        return (self.q_start - self.row_starts).clamp(min=0)

    @once
    def query_block_ids(self) -> torch.Tensor:
        """Grid index of every query block, int64 `[B, NQ]`; blocks past a row's end have no query."""
        steps = torch.arange(self.num_query_blocks, device=self.row_starts.device)
        return self.first_query[:, None] // self.block_size + steps

    @once
    def query_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last-plus-one real query of each query block, as positions within the row, int64 `[B, NQ]` each."""
        begin = self.query_block_ids * self.block_size
        end = torch.minimum(begin + self.block_size, self.lengths[:, None])
        begin = torch.maximum(begin, self.first_query[:, None])
        return begin, torch.maximum(begin, end)

    @once
    def causal(self) -> torch.Tensor:
        """Blocks that hold at least one causal pair of real tokens, bool `[B, NQ, N]`."""
        key_block = torch.arange(self.num_key_blocks, device=self.row_starts.device)
        return (key_block <= self.query_block_ids[..., None]) & self.has_queries[..., None]

    def on_diagonals(self, chosen: torch.Tensor) -> torch.Tensor:
        """Blocks on block diagonals, bool `[B, Hq, NQ, N]`; `chosen` is bool `[B, Hq, N]` by block distance."""
        key_block = torch.arange(self.num_key_blocks, device=chosen.device)
        distance = (self.query_block_ids[..., None] - key_block).clamp(0, self.num_key_blocks - 1)
        index = distance.flatten(1)[:, None].expand(-1, chosen.shape[1], -1)
        return chosen.gather(-1, index).unflatten(-1, distance.shape[1:])

    @once
    def has_queries(self) -> torch.Tensor:
        """Which query blocks hold a real query, bool `[B, NQ]`."""
        begin, end = self.query_bounds
        return end > begin

    @once
    def query_index(self) -> torch.Tensor:
        """Index into the call's queries for every slot of a query block, int64 `[B, NQ, block]`; may lie outside."""
        slots = torch.arange(self.block_size, device=self.row_starts.device)
        in_row = self.query_block_ids[..., None] * self.block_size + slots
        return in_row + (self.row_starts - self.q_start)[:, None, None]

    @once
    def query_is_real(self) -> torch.Tensor:
        """Which slots of `query_index` hold a real query, bool `[B, NQ, block]`."""
        first_index = (self.row_starts - self.q_start).clamp(min=0)[:, None, None]
        return (self.query_index >= first_index) & (self.query_index < self.q_length)
