"""TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention (ICLR 2025).

The tokens that a layer attends to most are much the same in the layers after it. Two layers read everything and choose
the tokens with the highest logits, separately for each query head. The layers between and after them read those tokens,
head by head, until the second one chooses again. The choice is made anew for every token. arXiv 2410.05076; code:
DerrickYLJ/TidalDecode.

Paper and public code differ:

- The number of the second selecting layer is 13 for Llama-3 in the paper and in the accuracy code, which counts from 0;
  it is 12 in the latency code. Here layers count from 0, so it is 13.
- The current token: the accuracy code forces nothing, so a sparse layer may leave out the token that it computes. The
  latency code always reads it, within its budget. `force_current: true` follows the latency code, `false` the accuracy
  code.
- `index_sharing: q_head` follows the paper; with it, grouped heads read up to a group's size times the budget.
  `kv_group` and `all` are ours: one list for the query heads of a KV head, or for all heads. A token's score is then
  the highest of the heads' softmax probabilities (DELTA's measure), because logits of different heads cannot be
  compared.

In both codes and here no sinks and no window are forced. Several queries at a time (speculative decoding) are dense;
the public code decodes them sparsely. The paper's periodic KV-cache correction is off by default; `correction_period`
turns it on.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from sparse_patch.call import AttentionCall
from sparse_patch.files.reading import MOST
from sparse_patch.methods.base.layered import TIDAL_PRESETS, LastLogits, LayeredMethod
from sparse_patch.ops.selection.page_scores import page_scores
from sparse_patch.plans import PagePlan


class TidalDecode(LayeredMethod):
    """The top-k tokens by the logits of a selecting layer.

    Attributes:
        budget: tokens of a list, including the current one.
        force_current: whether the current token is always in the list.
        index_sharing: which heads share a list; see the module's text.
        correction_period: number of tokens between corrections of the cache (see `integration.kv_correction`); None if
            the cache is never corrected. A static cache is never corrected.
    """

    summary = "tokens with the highest logits of two layers, reused by the layers after them"
    paper = "TidalDecode, ICLR 2025, arXiv 2410.05076"
    presets = TIDAL_PRESETS

    method: Literal["tidaldecode"] = "tidaldecode"
    budget: Annotated[int, Field(gt=0, le=MOST)] | None = 4096
    force_current: bool = True
    index_sharing: Literal["q_head", "kv_group", "all"] = "q_head"
    correction_period: Annotated[int, Field(gt=0, le=MOST)] | None = None

    @property
    def correct_every(self) -> int | None:
        return self.correction_period

    def choose(self, call: AttentionCall, statistics: LastLogits) -> PagePlan:
        """Choose the top-k tokens of each list; see `DecodeMethod.choose`."""
        lengths = call.lengths()
        lists = self.highest(call, self._scores(call, *statistics), lengths, last=int(self.force_current))
        return PagePlan.of(call, *lists, page_size=1)

    def _scores(self, call: AttentionCall, logits: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """The score of each token in each list, float32 `[B, L, capacity]`."""
        if self.index_sharing == "q_head":
            return logits
        if self.index_sharing == "all":
            return page_scores(logits, lse, call.lengths(), 1, shard=call.shard)[:, None]
        lists = call.k.shape[1]
        logits, lse = (part.unflatten(1, (lists, -1)).flatten(0, 1) for part in (logits, lse))
        lengths = call.lengths().repeat_interleave(lists)
        return page_scores(logits, lse, lengths, 1).unflatten(0, (-1, lists))
