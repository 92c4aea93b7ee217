"""Plans: what a method decided, as data. A plan owns no kernel and knows no method.

Every plan has `density()`, the share of the causal triangle it computes (padding excluded from both sides), so that
methods, tests, the report, the pictures and the benchmarks mean the same by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from sparse_patch.call import AttentionCall, causal_pairs
from sparse_patch.ops.compact import compact

_EVERY = 1 << 40  # more keys than there are
BLOCK_BITS = 8  # of an entry of a `TokenBlockPlan` that say which tokens of a tile read the block


@dataclass(frozen=True)
class Dense:
    """Read every key: what a method answers when sparsity has nothing to give (short prompt, `gamma: 1`, ...)."""

    reason: str

    def density(self) -> float:
        return 1.0


@dataclass(frozen=True)
class BlockGrid:
    """The grid of square blocks that a call is cut into, each row of the batch from its own first key.

    Key block `J` of row `b` holds the keys `kv_start[b] + J*B ... + B-1`. Query blocks lie on the same grid, so the
    diagonal block of query block `I` is key block `I`; in a chunk that begins inside a block the first query block is
    partial. Row `b` has its query blocks `first_block[b] + 0, 1, ...`. Because rows count from their own start, a
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
        """Query blocks that the row with the most of them can have, NQ (a host number, whatever the padding)."""
        if not self.padded:
            return self.num_key_blocks - self.q_start // self.block_size
        worst = -(-self.q_length // self.block_size) + (self.q_start > 0)
        return min(worst, self.num_key_blocks)

    def visible_key_blocks(self, query_blocks: int) -> int:
        """Most key blocks that the first so many query blocks of a row can see (a host number)."""
        return min(self.q_start // self.block_size + query_blocks, self.num_key_blocks)

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Real keys of each row, int64 `[B]`."""
        return self.kv_length - self.row_starts

    @cached_property
    def key_blocks_per_row(self) -> torch.Tensor:
        """Key blocks of each row, int64 `[B]`."""
        return -(-self.lengths // self.block_size)

    @cached_property
    def tail(self) -> torch.Tensor:
        """Tokens that each row's last key block lacks, int64 `[B]`."""
        return self.key_blocks_per_row * self.block_size - self.lengths

    @cached_property
    def key_block_tokens(self) -> torch.Tensor:
        """Real keys of each key block, int64 `[B, N]`; 0 for blocks that a row lacks."""
        begin = torch.arange(self.num_key_blocks, device=self.row_starts.device) * self.block_size
        return (self.lengths[:, None] - begin).clamp(0, self.block_size)

    @cached_property
    def has_key_block(self) -> torch.Tensor:
        """Which key blocks each row has, bool `[B, N]`."""
        key_block = torch.arange(self.num_key_blocks, device=self.row_starts.device)
        return key_block < self.key_blocks_per_row[:, None]

    @cached_property
    def first_query(self) -> torch.Tensor:
        """Position, within its row, of each row's first real query, int64 `[B]`."""
        return (self.q_start - self.row_starts).clamp(min=0)

    @cached_property
    def query_block_ids(self) -> torch.Tensor:
        """Grid index of every query block, int64 `[B, NQ]`; blocks past a row's end have no rows."""
        steps = torch.arange(self.num_query_blocks, device=self.row_starts.device)
        return self.first_query[:, None] // self.block_size + steps

    @cached_property
    def query_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last-plus-one real query of each query block, as positions within the row, int64 `[B, NQ]` each."""
        begin = self.query_block_ids * self.block_size
        end = torch.minimum(begin + self.block_size, self.lengths[:, None])
        begin = torch.maximum(begin, self.first_query[:, None])
        return begin, torch.maximum(begin, end)

    @cached_property
    def causal(self) -> torch.Tensor:
        """Blocks that hold at least one causal pair of real tokens, bool `[B, NQ, N]`."""
        key_block = torch.arange(self.num_key_blocks, device=self.row_starts.device)
        return (key_block <= self.query_block_ids[..., None]) & self.has_queries[..., None]

    def on_diagonals(self, chosen: torch.Tensor) -> torch.Tensor:
        """Blocks on the `chosen` block diagonals, bool `[B, Hq, N]` by block distance: bool `[B, Hq, NQ, N]`."""
        key_block = torch.arange(self.num_key_blocks, device=chosen.device)
        distance = (self.query_block_ids[..., None] - key_block).clamp(0, self.num_key_blocks - 1)
        index = distance.flatten(1)[:, None].expand(-1, chosen.shape[1], -1)
        return chosen.gather(-1, index).unflatten(-1, distance.shape[1:])

    @cached_property
    def has_queries(self) -> torch.Tensor:
        """Which query blocks hold a real query, bool `[B, NQ]`."""
        begin, end = self.query_bounds
        return end > begin

    @cached_property
    def query_index(self) -> torch.Tensor:
        """Index into the call's queries of every slot of every query block, int64 `[B, NQ, block]`; may lie outside."""
        slots = torch.arange(self.block_size, device=self.row_starts.device)
        in_row = self.query_block_ids[..., None] * self.block_size + slots
        return in_row + (self.row_starts - self.q_start)[:, None, None]

    @cached_property
    def query_is_real(self) -> torch.Tensor:
        """Which slots of `query_index` hold a real query, bool `[B, NQ, block]`."""
        first_index = (self.row_starts - self.q_start).clamp(min=0)[:, None, None]
        return (self.query_index >= first_index) & (self.query_index < self.q_length)


@dataclass(frozen=True)
class BlockPlan:
    """For each (row, query head, query block), the key blocks to read, and single key columns beside them.

    Attributes:
        indices: int32 `[B, Hq, NQ, N]`; the first `counts` entries of a list are key blocks in ascending order, each at
            most once and none above the diagonal. What follows them has no meaning.
        counts: int32 `[B, Hq, NQ]`; 0 for the query blocks that a row does not have.
        grid: the grid that the indices refer to.
        columns: int32 `[B, Hq, NQ, C]`; the first `column_counts` entries of a list are keys, as positions within the
            row, each at most once, in none of the listed blocks and before the query block. None for no columns.
        column_counts: int32 `[B, Hq, NQ]`, or None.
        pv_threshold: tiles whose logits lie this far below what was read before them, in log2 units, count for nothing
            (`ops.block_sparse` says which). 0 or more; None for no such tile. Only a plan without columns may have it.
            `mask`, `density` and what else the plan says include these tiles.
        decided_pairs: causal pairs that the method decided to read, where it decides finer than in whole blocks, int64
            `[B, Hq]`; None where the blocks are its decision. For the report.
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
        """From a map of blocks and from columns; what lies outside the causal triangle is dropped.

        Args:
            blocks: bool `[B, Hq, NQ, N]`.
            grid: their grid.
            columns: int64 `[B, Hq, C]`, keys as positions within the row, each at most once; a negative entry is none.
                A query block reads those that come before it and lie in none of its blocks.
            is_causal: whether the map has nothing outside of the triangle, which saves a copy of it.
        """
        if not is_causal:
            blocks = blocks & grid.causal[:, None]
        key_block = torch.arange(blocks.shape[-1], dtype=torch.int32, device=blocks.device)
        indices, counts = compact(blocks, key_block.expand(blocks.shape))
        if columns is None:
            return cls(indices, counts, grid)
        block = (columns // grid.block_size).clamp(0, blocks.shape[-1] - 1)
        in_blocks = blocks.gather(-1, block[:, :, None].expand(-1, -1, blocks.shape[2], -1))
        key = columns.masked_fill(columns < 0, grid.kv_length)  # before no query block
        end = (grid.query_block_ids * grid.block_size).masked_fill(~grid.has_queries, 0)
        wanted = (key[:, :, None] < end[:, None, :, None]) & ~in_blocks
        return cls(indices, counts, grid, *compact(wanted, columns.int()[:, :, None].expand(wanted.shape)))

    @property
    def listed(self) -> torch.Tensor:
        """Which entries of `indices` count, bool `[B, Hq, NQ, N]`."""
        return leading(self.indices, self.counts)

    @property
    def on_diagonal(self) -> torch.Tensor:
        """Which lists end with the diagonal block of their query block, bool `[B, Hq, NQ]`."""
        last = self.indices.gather(-1, (self.counts.long() - 1).clamp(min=0)[..., None]).squeeze(-1)
        return (self.counts > 0) & (last == self.grid.query_block_ids[:, None])

    def blocks(self) -> torch.Tensor:
        """The plan's blocks as a map, bool `[B, Hq, NQ, N]`."""
        return _marked(self.indices, self.counts, self.grid.num_key_blocks)

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
            single = _marked(self.columns, self.column_counts, grid.kv_length).permute(0, 2, 3, 1)
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

    @property
    def pairs_by_head(self) -> torch.Tensor:
        """`computed_pairs`, summed over the batch, int64 `[Hq]`."""
        return self.computed_pairs().sum(0)

    def density(self) -> torch.Tensor:
        """Share of the causal triangle that is computed, float32 `[B, Hq]`."""
        causal = causal_pairs(self.grid.q_start, self.grid.kv_length, self.grid.row_starts)
        return self.computed_pairs().float() / causal[:, None].clamp(min=1).float()


@dataclass(frozen=True)
class TokenBlockPlan:
    """For each (row, KV head, query) the key blocks to read; the query heads of a KV head read the same.

    A query in block `I` of its row reads the first `init_blocks` blocks, the blocks `I - local_blocks ... I` up to
    itself, and of those in between the ones that are listed for it. A query in one of the first `dense_blocks` blocks
    reads every key before it.

    Lists are shared by tiles of neighbouring queries, which choose much the same. Query blocks lie on the grid, and
    tile `t` of a row holds the `tile` positions from `query_block_ids[b, 0] * B + t * tile` on.

    Attributes:
        entries: int32 `[B, Hkv, NT, C]`; the first `counts` of a list have a meaning, in ascending order. `entry >>
            BLOCK_BITS` is a key block, each at most once; bit `i` of the entry says whether query `i` of the tile reads
            it, and at least one does. Only queries that there are, and blocks that they do not read in any case.
        counts: int32 `[B, Hkv, NT]`.
        grid: the grid of the blocks.
        tile: queries of a tile: a power of two, `BLOCK_BITS` at most.
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
            blocks: bool `[B, Hkv, NQ, block, N]`: by query block, query in it and key block.
            real: bool `[B, NQ, block]`, see `BlockGrid.query_is_real`.
            tile: queries of a tile.
        """
        of_tiles = (blocks & real[:, None, ..., None]).flatten(2, 3).unflatten(2, (-1, tile))
        bit = torch.arange(tile, dtype=torch.int32, device=blocks.device)[:, None]
        readers = (of_tiles.int() << bit).sum(3, dtype=torch.int32)
        number = torch.arange(blocks.shape[-1], dtype=torch.int32, device=blocks.device)
        return compact(readers != 0, (number << BLOCK_BITS) | readers)

    def blocks(self) -> torch.Tensor:
        """What every query reads as a map of blocks, bool `[B, Hkv, NQ, block, N]`; its own block included."""
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

    @cached_property
    def pairs_by_head(self) -> torch.Tensor:
        """`computed_pairs`, summed over the batch, int64 `[Hq]`."""
        return self.computed_pairs().sum(0)

    def density(self) -> torch.Tensor:
        """Share of the causal triangle that is read, float32 `[B, Hq]`."""
        causal = causal_pairs(self.grid.q_start, self.grid.kv_length, self.grid.row_starts)
        return self.computed_pairs().float() / causal[:, None].clamp(min=1).float()

    @cached_property
    def _between(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks that the queries of a block may have listed: from and up to, int64 `[B, NQ]` both."""
        block = self.grid.query_block_ids
        low = (block - self.local_blocks).clamp(min=0).masked_fill(block < self.dense_blocks, 0)
        return low.clamp(max=self.init_blocks), low


@dataclass(frozen=True)
class PagePlan:
    """For each (row, list), the pages of keys to read: what decode plans are. Nothing here reads a length on the host.

    Page `u` of row `b` holds the keys `kv_start[b] + u*P ... + P-1`: rows count from their own first key, so a
    left-padded row has the pages that it has alone. Query `i` of the call reads the keys of the listed pages up to
    itself.

    Attributes:
        page_size: tokens of a page, P; 1 for lists of tokens.
        heads: query heads, Hq.
        q_length: queries of the call, Sq.
        capacity: keys that the call's `k` has room for, valid or not (a host number).
        lengths: real keys of each row, int64 `[B]`.
        kv_start: first real key of each row, int64 `[B]`; None where no row is padded.
        pages: int32 `[B, L, K]`, where L is 1 (one list for all heads), Hkv or Hq; the first `counts` entries of a list
            are pages, in any order, each at most once and each with a key at or before the last query. None for every
            page.
        counts: int32 `[B, L]`; None for every page.
        wants_logits: whether the method asks for the logits of the last query (see `DecodeMethod.select`); only a plan
            of every page may.
    """

    page_size: int
    heads: int
    q_length: int
    capacity: int
    lengths: torch.Tensor
    kv_start: torch.Tensor | None = None
    pages: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    wants_logits: bool = False

    @classmethod
    def every(cls, call: AttentionCall, page_size: int = 1, wants_logits: bool = False) -> "PagePlan":
        """Dense decode: every page."""
        _, heads, q_length, _ = call.q.shape
        of_rows = call.lengths(), call.kv_start
        return cls(page_size, heads, q_length, call.kv_length, *of_rows, wants_logits=wants_logits)

    @classmethod
    def of(cls, call: AttentionCall, pages: torch.Tensor, counts: torch.Tensor, page_size: int) -> "PagePlan":
        """The listed pages; arguments as the attributes."""
        _, heads, q_length, _ = call.q.shape
        return cls(page_size, heads, q_length, call.kv_length, call.lengths(), call.kv_start, pages, counts)

    @property
    def num_pages(self) -> int:
        """Pages that a row can have (a host number)."""
        return -(-self.capacity // self.page_size)

    def mask(self) -> torch.Tensor:
        """The plan as a mask of tokens, bool `[B, Hq, Sq, capacity]`: for the oracle and for pictures."""
        device = self.lengths.device
        starts = torch.zeros_like(self.lengths) if self.kv_start is None else self.kv_start
        key = torch.arange(self.capacity, device=device) - starts[:, None]
        position = torch.arange(self.q_length, device=device) + (self.lengths - self.q_length)[:, None]
        causal = ((key[:, None, :] <= position[:, :, None]) & (key[:, None, :] >= 0))[:, None]
        if self.pages is None or self.counts is None:
            return causal.expand(-1, self.heads, -1, -1)
        read = _marked(self.pages, self.counts, self.num_pages)
        page = (key.clamp(min=0) // self.page_size)[:, None].expand(-1, read.shape[1], -1)
        of_lists = read.gather(-1, page).repeat_interleave(self.heads // read.shape[1], 1)
        return of_lists[:, :, None] & causal

    def computed_pairs(self) -> torch.Tensor:
        """(Query, key) pairs of real tokens that the plan computes, int64 `[B, Hq]`."""
        if self.pages is None or self.counts is None:
            return self._causal_pairs()[:, None].expand(-1, self.heads)
        queries = torch.arange(self.q_length, device=self.pages.device)
        seen = (self.lengths - self.q_length + 1)[:, None] + queries  # keys that each query may read, [B, Sq]
        in_page = (seen[:, None, None] - self.pages[..., None] * self.page_size).clamp(0, self.page_size)
        pairs = (in_page.sum(-1) * leading(self.pages, self.counts)).sum(-1)
        return pairs.repeat_interleave(self.heads // pairs.shape[1], 1)

    @cached_property
    def pairs_by_head(self) -> torch.Tensor:
        """`computed_pairs`, summed over the batch, int64 `[Hq]`; kept, for a plan may serve several layers."""
        return self.computed_pairs().sum(0)

    def density(self) -> torch.Tensor:
        """Share of the causal pairs that is computed, float32 `[B, Hq]`."""
        return self.computed_pairs().float() / self._causal_pairs()[:, None].clamp(min=1).float()

    def _causal_pairs(self) -> torch.Tensor:
        return causal_pairs(self.lengths - self.q_length, self.lengths, torch.zeros_like(self.lengths))


@dataclass(frozen=True)
class GrowingWindow:
    """A window that grows with the text: the query at position i has `(base + slope * (i + 1)) >> 16` keys.

    Attributes:
        base: in 2^-16 tokens; may be negative.
        slope: in 2^-16 tokens for each token; at most 2^16, so that no window moves back to a key that it has left.
        least: keys that every query has.
        most: keys that a query has at most.
    """

    base: int
    slope: int
    least: int
    most: int

    def at(self, position: int) -> int:
        """Keys of the query at a position, the query itself among them."""
        return min(max((self.base + self.slope * (position + 1)) >> 16, self.least), self.most)


Window = int | GrowingWindow | None  # keys up to the query itself; None for every key


@dataclass(frozen=True)
class SpanPlan:
    """For each KV head a sink and a window, by the token: what StreamingLLM, DuoAttention and MoA decide beforehand.

    The query at position `i` of its row reads the keys `j <= i` with `j < sink` or `i - j < window`. Positions count
    from the row's first real token, and the queries are the last tokens of the call, so the rule is the same whether a
    prompt comes at once, in chunks or token by token. Nothing here reads a length on the host.

    Attributes:
        sinks: first tokens of a row that every query reads, one number per KV head.
        windows: keys that a query reads up to itself, 1 for itself alone, one window per KV head; None for every key.
        heads: query heads, Hq; head `h` uses KV head `h // (Hq // Hkv)`.
        q_length: queries of the call, Sq.
        capacity: keys that the call's `k` has room for, valid or not (a host number).
        lengths: real keys of each row, int64 `[B]`.
        row_starts: where in `k` each row begins, int64 `[B]`; negative where its first keys are not in `k`.

    Raises:
        ValueError: sinks and windows are not one per KV head, a sink is negative or a window below 1.
    """

    sinks: tuple[int, ...]
    windows: tuple[Window, ...]
    heads: int
    q_length: int
    capacity: int
    lengths: torch.Tensor
    row_starts: torch.Tensor

    def __post_init__(self) -> None:
        check_spans(self.sinks, self.windows)
        if self.heads % len(self.sinks):
            raise ValueError(f"{self.heads} query heads cannot share the spans of {len(self.sinks)} KV heads")

    @classmethod
    def of(cls, call: AttentionCall, sinks: Sequence[int], windows: Sequence[Window]) -> "SpanPlan":
        """The spans on a call; arguments as the attributes."""
        if len(sinks) != call.k.shape[1]:
            raise ValueError(f"{len(sinks)} spans for {call.k.shape[1]} KV heads")
        _, heads, q_length, _ = call.q.shape
        of_rows = call.lengths(), call.row_starts()
        return cls(tuple(sinks), tuple(windows), heads, q_length, call.kv_length, *of_rows)

    @property
    def spans(self) -> list[tuple[int, Window]]:
        """Sink and window of each KV head; the sink of a head that reads everything is 0."""
        return spans_of(self.sinks, self.windows)

    def mask(self) -> torch.Tensor:
        """The plan as a mask of tokens, bool `[B, Hq, Sq, capacity]`: for the oracle and for pictures."""
        device = self.lengths.device
        key = (torch.arange(self.capacity, device=device) - self.row_starts[:, None])[:, None]
        query = (torch.arange(self.q_length, device=device) + (self.lengths - self.q_length)[:, None])[..., None]
        of_kv_heads = torch.stack([in_span(query, key, *span) for span in self.spans], 1)
        return of_kv_heads.repeat_interleave(self.heads // len(self.sinks), 1)

    def computed_pairs(self) -> torch.Tensor:
        """(Query, key) pairs of real tokens that the plan computes, int64 `[B, Hq]`."""
        sinks, numbers = _numbers(tuple(self.spans), self.lengths.device)
        length = self.lengths[:, None] - self.q_length + torch.arange(1, self.q_length + 1, device=self.lengths.device)
        keys = torch.minimum(length[..., None], sinks + _grown(length[..., None] - 1, *numbers))
        of_kv_heads = keys.masked_fill(length[..., None] < 1, 0).sum(1)
        return of_kv_heads.repeat_interleave(self.heads // len(self.sinks), 1)

    @cached_property
    def pairs_by_head(self) -> torch.Tensor:
        """`computed_pairs`, summed over the batch, int64 `[Hq]`."""
        return self.computed_pairs().sum(0)

    def density(self) -> torch.Tensor:
        """Share of the causal pairs that is computed, float32 `[B, Hq]`."""
        causal = causal_pairs(self.lengths - self.q_length, self.lengths, torch.zeros_like(self.lengths))
        return self.computed_pairs().float() / causal[:, None].clamp(min=1).float()


SparsePlan = BlockPlan | TokenBlockPlan | PagePlan | SpanPlan
Plan = SparsePlan | Dense


def check_spans(sinks: Sequence[int], windows: Sequence[Window]) -> None:
    """Refuse what are no spans.

    Raises:
        ValueError: there are not as many sinks as windows, or none; a sink is negative or a window below 1.
    """
    if len(sinks) != len(windows) or not sinks:
        raise ValueError(f"spans need a sink and a window per KV head, got {len(sinks)} and {len(windows)}")
    if min(sinks) < 0 or any(numbers_of(window)[3] < 1 for window in windows):
        raise ValueError(f"a sink is 0 or more and a window 1 or more, got sinks {sinks} and windows {windows}")
    if any(isinstance(window, GrowingWindow) and not 0 <= window.slope <= 1 << 16 for window in windows):
        raise ValueError(f"a window grows by 0 to 1 token for each token, got windows {windows}")


def spans_of(sinks: Sequence[int], windows: Sequence[Window]) -> list[tuple[int, Window]]:
    """Sink and window of each KV head; the sink of a head that reads everything is 0."""
    return [(0 if window is None else sink, window) for sink, window in zip(sinks, windows, strict=True)]


def widest(window: int | GrowingWindow) -> int:
    """Keys that any query has at most."""
    return window.most if isinstance(window, GrowingWindow) else window


def numbers_of(window: Window) -> tuple[int, int, int, int]:
    """Most, base, slope and least of a window; see `GrowingWindow`, which every window is one of."""
    if isinstance(window, GrowingWindow):
        return window.most, window.base, window.slope, window.least
    return (_EVERY, 0, 0, _EVERY) if window is None else (window, 0, 0, window)


def in_span(query: torch.Tensor, key: torch.Tensor, sink: int, window: Window) -> torch.Tensor:
    """Whether queries read keys, both given by their position in the row; no position is negative but of padding."""
    causal = (key <= query) & (key >= 0)
    if window is None:
        return causal
    reach = _grown(query, *numbers_of(window)) if isinstance(window, GrowingWindow) else window
    return causal & ((key < sink) | (query - key < reach))


def _grown(position: torch.Tensor, most: Any, base: Any, slope: Any, least: Any) -> torch.Tensor:
    """Windows of queries at positions; see `GrowingWindow.at`."""
    return ((base + slope * (position + 1)) >> 16).clamp(least, most)


@lru_cache(maxsize=1024)
def _numbers(spans: tuple[tuple[int, Window], ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Sinks `[Hkv]` and `numbers_of` windows `[4, Hkv]`, int64; kept: bringing numbers to a GPU makes the host wait."""
    rows = [(sink, *numbers_of(window)) for sink, window in spans]
    table = torch.tensor(rows, dtype=torch.int64, device=device).T.contiguous()
    return table[0], table[1:]


def leading(lists: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Which entries of lists `[..., n]` are among the first `counts` `[...]`, bool `[..., n]`."""
    return torch.arange(lists.shape[-1], device=counts.device) < counts[..., None]


def _marked(lists: torch.Tensor, counts: torch.Tensor, size: int) -> torch.Tensor:
    """Lists of numbers below `size` as maps, bool `[..., size]`."""
    marked = torch.zeros(*lists.shape[:-1], size + 1, dtype=torch.bool, device=lists.device)
    target = torch.where(leading(lists, counts), lists, size)
    return marked.scatter_(-1, target.long(), True)[..., :-1]
