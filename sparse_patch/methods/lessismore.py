"""LessIsMore: Training-Free Sparse Attention with Global Locality for Efficient Reasoning (2025).

LessIsMore has TidalDecode's layers, with one list for all heads. The list holds the last tokens, the first ones, and
those that rank highest in any head, merged rank by rank. arXiv 2508.07101; written from the paper. The algorithm in
plain PyTorch: `ops/selection/rank_merge/torch.py`.

The paper leaves some points open; they are decided as follows:

- The share of the last tokens, `recency`, is cut off first. Each head ranks the rest by its logits, including the first
  tokens. The best token of every head comes first (lower heads before higher ones), then the second best of every head,
  and so on, each token once, until the budget is full.
- The `sink` tokens count as part of the budget and replace the tokens that rank last. So a token that some head ranks
  first is always in the list if the budget without recency and sinks holds at least as many tokens as there are heads.
- The share of the last tokens is rounded up, so the current token is among them unless `recency` is 0.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from sparse_patch.call import AttentionCall
from sparse_patch.methods.base.layered import TIDAL_PRESETS, LastLogits, LayeredMethod
from sparse_patch.methods.base.settings import Tokens
from sparse_patch.ops.selection.rank_merge import merged_list, merged_scores
from sparse_patch.plans import PagePlan


class LessIsMore(LayeredMethod):
    """The top-k tokens, merged over all heads by rank.

    Attributes:
        budget: tokens of the list, including the last and the first ones.
        recency: share of the budget that the last tokens get, in [0, 1).
        sink: first tokens that are always read.
    """

    summary = "tokens that rank highest in any head of two layers, one list for all heads"
    paper = "LessIsMore, 2025, arXiv 2508.07101"
    presets = TIDAL_PRESETS
    renamed: ClassVar[dict[str, str]] = {"sinks": "sink"}

    method: Literal["lessismore"] = "lessismore"
    recency: Annotated[float, Field(ge=0, lt=1)] = 0.25
    sink: Tokens = 4

    @property
    def fewest(self) -> int:
        return math.ceil((self.sink + 1) / (1 - self.recency))

    def choose(self, call: AttentionCall, statistics: LastLogits) -> PagePlan:
        """Choose the merged list; see `DecodeMethod.choose`."""
        lengths, most = call.lengths(), self.most(call.kv_length)
        recent = math.ceil(self.recency * most)
        if self.budget is not None:
            lists = merged_list(statistics.logits, lengths, most, first=self.sink, last=recent, shard=call.shard)
        else:
            of_rows = self._recent(self.tokens(lengths))
            scores = merged_scores(statistics.logits, lengths - of_rows, most - recent, shard=call.shard)
            lists = self.highest(call, scores[:, None], lengths, first=self.sink, last=of_rows)
        return PagePlan.of(call, *lists, page_size=1)

    def _recent(self, tokens: torch.Tensor) -> torch.Tensor:
        """How many of `tokens` are the last ones; both int64 `[B]`."""
        return tokens.double().mul(self.recency).ceil().long()
