"""MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention (NeurIPS 2024).

Each query head has one of three patterns, found offline. Which keys a pattern reads is decided per prompt.

- `vertical_and_slash`: the attention of the last 64 queries, summed over columns and over diagonals, says which key
  columns ("verticals") and which distances ("slashes") the head needs. The head takes a fixed number of each. The first
  30 keys and the distances below 100 are always among them.
- `stream_llm`: the first tokens and a window of the last ones, as in `a_shape`.
- `block_sparse`: for every query block the key blocks with the highest pooled attention.

arXiv 2407.02490; code: microsoft/MInference. This implementation differs from the public code in the following:

- Slashes: for each block of 64 queries the code cuts ranges of 64 keys that lie on no grid. Here a slash brings the
  aligned blocks that it touches: one block diagonal if its distance is a multiple of `block_size`, else two. Everything
  that was selected is read, each key once, and around the slashes some more keys than in the code.
- There are never fewer slashes than the 100 forced ones. With fewer, the code keeps an arbitrary part of them.
- `block_sparse`: the scores are the softmax of scaled, soft-capped logits of means over the real tokens of a block, as
  in the paper and in sparse-frontier. The first and the diagonal block are forced, as in sparse-frontier. The code
  takes raw products of means with zero padding and forces nothing.
- Served are any batch size, left padding (each row counts from its first real token), chunked prefill (a chunk selects
  with its own last queries; the code goes dense) and the model's own scale and softcap.

Selection looks at the last queries of the call, so a token's output depends on tokens after it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from sparse_patch.artefacts.base import place_of
from sparse_patch.artefacts.patterns import MISSING, Kind, Pattern, read_patterns
from sparse_patch.artefacts.patterns import Patterns as Calibration
from sparse_patch.call import AttentionCall
from sparse_patch.methods.a_shape import a_shape_blocks
from sparse_patch.methods.base.bound import BoundMethod, BoundPrefill, Selection
from sparse_patch.methods.base.settings import PrefillMethod, Tokens
from sparse_patch.model_shape import ModelShape
from sparse_patch.ops.selection.block_means import key_means
from sparse_patch.ops.selection.last_queries import last_query_profiles
from sparse_patch.ops.selection.pooling import pooled_attention
from sparse_patch.plans import BlockGrid, BlockPlan, Dense, Plan

Patterns = tuple[Pattern, ...]  # one for each query head of a layer
LAST_QUERIES = 64
FORCED_COLUMNS = 30
FORCED_DISTANCES = 100


class MInference(PrefillMethod):
    """Vertical-slash, A-shape or block-sparse, per head.

    Attributes:
        vertical: number of key columns of every head; at least 30. Not used with a calibration.
        slash: number of distances of every head; at least 100. Not used with a calibration.
        block_budget: tokens that a block_sparse head keeps for each query block.
        calibration: JSON file with the pattern of each head: a list with one element per layer, which maps a head's
            index to [pattern, columns, diagonals, score]. A missing head is vertical_and_slash 1000, 6096. A relative
            path counts from the folder of the YAML file that names the calibration. None for the same sizes everywhere.
        block_size: side of a block in tokens.
    """

    summary = "columns and diagonals, A-shape or blocks, by a pattern per head"
    paper = "MInference, NeurIPS 2024, arXiv 2407.02490"
    files = ("calibration",)

    method: Literal["minference"] = "minference"
    vertical: Tokens = 512
    slash: Tokens = 2048
    block_budget: Tokens = 6400
    calibration: str | None = None

    def bind(self, shape: ModelShape) -> BoundMethod:
        """See `Method.bind`."""
        calibrated = self.artefact()
        if calibrated is None:
            return BoundPrefill(self)
        calibrated.check_shape(shape, place_of(self.calibration))
        return BoundMInference(self, calibrated.layers)

    def artefact(self) -> Calibration | None:
        """See `Method.artefact`."""
        return None if self.calibration is None else read_patterns(self.calibration)

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """See `PrefillMethod.why_dense`."""
        return super().why_dense(call) or self.why_dense_by(call, self._uniform(call))

    def dense_tokens(self, call: AttentionCall) -> int:
        """See `PrefillMethod.dense_tokens`."""
        return self.dense_tokens_by(self._uniform(call))

    def select(self, call: AttentionCall, grid: BlockGrid) -> Selection:
        """Select with the same pattern for every head; see `PrefillMethod.select`."""
        return self.select_by(call, grid, self._uniform(call))

    def _uniform(self, call: AttentionCall) -> Patterns:
        return (Pattern("vertical_and_slash", self.vertical, self.slash),) * call.q.shape[1]

    def why_dense_by(self, call: AttentionCall, patterns: Patterns) -> Dense | None:
        """`why_dense` for given patterns, one per head, without `min_length`."""
        kept = self._kept(patterns)
        if call.kv_length <= kept:
            return Dense(f"no longer than the {kept} tokens that every head keeps")
        if call.q.shape[2] <= LAST_QUERIES:
            return Dense("no more queries than the selection itself attends to")
        return None

    def dense_tokens_by(self, patterns: Patterns) -> int:
        """`dense_tokens` for given patterns, one per head."""
        return max(self._kept(patterns), self.min_length - 1)

    def select_by(self, call: AttentionCall, grid: BlockGrid, patterns: Patterns) -> Selection:
        """Select by the given pattern of each head."""
        sizes = _sizes(patterns, call.q.device)
        parts: list[torch.Tensor] = []
        columns = None
        if "vertical_and_slash" in sizes.of_kind:
            lines, columns = _vertical_slash(call, grid, sizes)
            parts.append(lines)
        if "stream_llm" in sizes.of_kind:
            parts.append(sizes.only("stream_llm", a_shape_blocks(grid, sizes.columns, sizes.diagonals)))
        if "block_sparse" in sizes.of_kind:
            number = max(2, -(-self.block_budget // self.block_size))  # at least both forced blocks
            parts.append(sizes.only("block_sparse", _highest_blocks(call, grid, number)))
        return Selection(reduce(torch.logical_or, parts), columns)

    def plan_by(self, call: AttentionCall, patterns: Patterns) -> BlockPlan | Dense:
        """The plan for given patterns, one per head, without `min_length`; for a search that tries many patterns."""
        if dense := self.why_dense_by(call, patterns):
            return dense
        grid = BlockGrid.of(call, self.block_size)
        return self.select_by(call, grid, patterns).plan(grid, self.dense_tokens_by(patterns))

    def _kept(self, patterns: Patterns) -> int:
        """Length in tokens up to which every head reads everything, whatever the row holds."""
        return max(LAST_QUERIES, min(self._always_dense(pattern) for pattern in patterns))

    def _always_dense(self, pattern: Pattern) -> int:
        """Length in tokens up to which a head reads everything, whatever the row holds."""
        if pattern.kind == "vertical_and_slash":
            return max(pattern.columns, pattern.diagonals, FORCED_DISTANCES)
        return pattern.columns + pattern.diagonals if pattern.kind == "stream_llm" else self.block_budget


class BoundMInference(BoundPrefill):
    """MInference with the calibrated patterns of a model.

    Attributes:
        heads: the patterns, by layer and head.
    """

    settings: MInference

    def __init__(self, settings: MInference, heads: Sequence[Mapping[int, Pattern]]) -> None:
        super().__init__(settings)
        self.heads = heads

    def patterns(self, layer: int, num_heads: int) -> Patterns:
        """The pattern of each query head of a layer."""
        return tuple(self.heads[layer].get(head, MISSING) for head in range(num_heads))

    def plan(self, call: AttentionCall) -> Plan:
        """See `BoundMethod.plan`."""
        if call.kv_length < self.settings.min_length:
            return self.settings.short
        heads = call.q.shape[1] * call.shard.size
        if max(self.heads[call.layer], default=0) >= heads:
            return Dense("the calibration has more heads than the call (tensor parallelism other than Transformers')")
        return self.settings.plan_by(call, call.shard.part(self.patterns(call.layer, heads)))


@dataclass(frozen=True)
class _Sizes:
    """The patterns of a layer's heads on the device.

    Attributes:
        most_columns: the largest number of verticals of any head.
        columns: int64 `[Hq]`.
        diagonals: int64 `[Hq]`.
        of_kind: for each pattern that occurs, the heads that have it, bool `[Hq]`.
    """

    most_columns: int
    columns: torch.Tensor
    diagonals: torch.Tensor
    of_kind: dict[Kind, torch.Tensor]

    def only(self, kind: Kind, blocks: torch.Tensor) -> torch.Tensor:
        """Keep the blocks `[B, Hq, NQ, N]` of the heads that have a pattern; clear the others."""
        return blocks & self.of_kind[kind][:, None, None]


@lru_cache(maxsize=1024)
def _sizes(patterns: tuple[Pattern, ...], device: torch.device) -> _Sizes:
    """The patterns on a device. They are cached, because copying numbers to a GPU makes the host wait."""
    vertical = [max(pattern.columns, FORCED_COLUMNS) for pattern in patterns if pattern.kind == "vertical_and_slash"]
    return _Sizes(
        most_columns=max(vertical, default=0),
        columns=torch.tensor([pattern.columns for pattern in patterns], device=device),
        diagonals=torch.tensor([pattern.diagonals for pattern in patterns], device=device),
        of_kind={
            kind: torch.tensor([pattern.kind == kind for pattern in patterns], device=device)
            for kind in get_args(Kind)
            if any(pattern.kind == kind for pattern in patterns)
        },
    )


def _vertical_slash(call: AttentionCall, grid: BlockGrid, sizes: _Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of the slashes, bool `[B, Hq, NQ, N]`, and verticals, int64 `[B, Hq, C]`.

    Verticals are positions within the row; -1 is an empty entry. Of equal entries the earlier key and the nearer
    distance come first. Heads with other patterns get nothing.
    """
    by_key, by_distance = last_query_profiles(call, LAST_QUERIES)
    here = sizes.of_kind["vertical_and_slash"]
    position = torch.arange(call.kv_length, device=call.q.device)
    in_row = (position - grid.row_starts[:, None])[:, None]
    by_key = by_key.masked_fill(in_row < FORCED_COLUMNS, torch.inf).masked_fill(in_row < 0, -1.0)
    number = sizes.columns.clamp(min=FORCED_COLUMNS).masked_fill(~here, 0)
    order, taken = _largest(by_key, number, grid.lengths, sizes.most_columns)
    verticals = torch.where(taken, order - grid.row_starts[:, None, None], -1).sort(-1).values
    exists = (position < grid.lengths[:, None])[:, None]
    by_distance = by_distance.masked_fill(position < FORCED_DISTANCES, torch.inf).masked_fill(~exists, -1.0)
    number = sizes.diagonals.clamp(min=FORCED_DISTANCES).masked_fill(~here, 0)
    order, taken = _largest(by_distance, number, grid.lengths, call.kv_length)
    slashes = torch.zeros_like(taken).scatter(-1, order, taken)
    return sizes.only("vertical_and_slash", grid.on_diagonals(_touched(slashes, grid))), verticals


def _largest(
    values: torch.Tensor, number: torch.Tensor, lengths: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest entries of `values` `[B, Hq, n]`: `number` `[Hq]` of them, but at most `lengths` `[B]`.

    Returns:
        Indices, int64 `[B, Hq, min(n, most)]`, largest first, and which of them count, bool of the same shape.
    """
    order = values.argsort(dim=-1, descending=True, stable=True)[..., :most]
    rank = torch.arange(order.shape[-1], device=order.device)
    return order, rank < torch.minimum(number, lengths[:, None])[..., None]


def _touched(slashes: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Block diagonals `[B, Hq, N]` that hold a pair of tokens at one of the distances `slashes` `[B, Hq, n]`."""
    padded = F.pad(slashes, (0, grid.num_key_blocks * grid.block_size - slashes.shape[-1]))
    within = padded.unflatten(-1, (grid.num_key_blocks, grid.block_size))
    return within.any(-1) | F.pad(within[..., 1:].any(-1), (1, -1))


def _highest_blocks(call: AttentionCall, grid: BlockGrid, number: int) -> torch.Tensor:
    """The first block, the diagonal one and those with the highest pooled attention, bool `[B, Hq, NQ, N]`."""
    attention = pooled_attention(call, grid, key_means(call.k, grid))
    key_block = torch.arange(grid.num_key_blocks, device=attention.device)
    forced = (key_block == 0) | (key_block == grid.query_block_ids[..., None])
    ranked = attention.masked_fill(forced[:, None], torch.inf).masked_fill(~grid.causal[:, None], -1.0)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, order, (key_block < number).expand(order.shape))
