"""The rule of the decisions, and what every backend reads from a call before it decides."""

from dataclasses import dataclass
from typing import Literal

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.ops.selection.block_means import key_means, query_means
from sparse_patch.ops.selection.pooling import mean_of_rows
from sparse_patch.plans import BlockGrid
from sparse_patch.plans.once import once

Numerics = Literal["int4", "int8"]

QUERY_TILE = 64  # queries per decision
KEY_BLOCK = 32  # keys per decision; the same number of blocks fills a word
WORD_KEYS = KEY_BLOCK * 32  # keys per word of decisions
SEGMENT = 128  # keys by which the candidates grow
DENSE_BELOW = 1e-5  # a tau below this makes a head dense


@dataclass(frozen=True)
class LowBitParams:
    """How blocks are scored, and which blocks are never scored.

    Attributes:
        numerics: "int4" or "int8"; see `ops.selection.low_bit_scores`.
        local_window: keys before the end of a query tile that are in its reference region; a multiple of 32.
    """

    numerics: Numerics = "int8"
    local_window: int = 128

    @property
    def largest_code(self) -> int:
        return 7 if self.numerics == "int4" else 127

    @property
    def always_kept(self) -> int:
        """A row of at most this many tokens has no candidates, whatever it holds."""
        return self.local_window + SEGMENT

    def candidates(self, visible: torch.Tensor) -> torch.Tensor:
        """How many key blocks, from block 1 on, are candidates if `visible` blocks are visible: whole segments.

        The published code counts in segments: the last `local_window` keys, and the rest of the first segment that they
        touch, are local.
        """
        per_segment = SEGMENT // KEY_BLOCK
        segments = (visible - 1 - self.local_window // KEY_BLOCK).div(per_segment, rounding_mode="floor")
        return segments.clamp(min=0) * per_segment


@dataclass(frozen=True)
class TileBounds:
    """The key blocks of every query tile of a call: block 0, candidates, and local blocks from `local` on.

    Attributes:
        grid: the call's grid of query tiles.
        rule: the rule.
    """

    grid: BlockGrid
    rule: LowBitParams

    @classmethod
    def of(cls, call: AttentionCall, rule: LowBitParams) -> "TileBounds":
        return cls(BlockGrid.of(call, QUERY_TILE), rule)

    @property
    def num_words(self) -> int:
        """Words of decisions that the longest possible row has."""
        return -(-self.grid.kv_length // WORD_KEYS)

    @once
    def visible(self) -> torch.Tensor:
        """Key blocks that each tile sees, including diagonal ones, int64 `[B, NQ]`; 0 for tiles without a query."""
        of_row = -(-self.grid.lengths // KEY_BLOCK)
        visible = torch.minimum((self.grid.query_block_ids + 1) * (QUERY_TILE // KEY_BLOCK), of_row[:, None])
        return visible.masked_fill(~self.grid.has_queries, 0)

    @once
    def local(self) -> torch.Tensor:
        """First local key block of each tile, int64 `[B, NQ]`."""
        return 1 + self.rule.candidates(self.visible)


def mean_key(call: AttentionCall) -> torch.Tensor:
    """Mean of the real keys of each row, `[B, Hkv, D]` in the dtype of the keys."""
    grid = BlockGrid.of(call, 128)
    return mean_of_rows(key_means(call.k, grid), grid.key_block_tokens).to(call.k.dtype)


def mean_query(call: AttentionCall) -> torch.Tensor:
    """Mean of the real queries of each row, `[B, Hq, D]` in the dtype of the queries."""
    grid = BlockGrid.of(call, 128)
    begin, end = grid.query_bounds
    return mean_of_rows(query_means(call.q, grid), end - begin).to(call.q.dtype)
