"""Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference (ICML 2024).

Every layer keeps, for each page of keys and each channel, the smallest and the largest value. These give an upper bound
of every logit in the page, and each query head reads the pages with the highest bounds. arXiv 2406.10774; code:
mit-han-lab/Quest. The algorithm in plain PyTorch: `ops/selection/page_statistics/torch.py`.

The paper and its two codes differ:

- The page of the current token. With `current_page: forced` it is one of the pages of the budget (the latency code).
  With `scored` it is a page like any other and may be left out (the accuracy code). With `added` it is one page more
  than the budget, as in sparse-frontier.
- The number of pages is the budget in whole pages, rounded up. Both codes round down; the accuracy code does so after
  it cuts the budget to the row's length, and it takes at least 3 pages. Here budgets below 3 pages (2 if the current
  page is forced) are refused.
- Grouped heads do not occur in the paper. `index_sharing: q_head` gives each query head its own list, as the accuracy
  code does after repeating keys; grouped heads then read up to a group's size times the budget. `kv_group` gives the
  query heads of a KV head one list, by the sum or the maximum of their bounds (`group_score`; the sum is from
  sparse-frontier).

In all of them the first two layers are dense, neither sinks nor a window are forced, and the model's scale has no
influence.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from sparse_patch.call import AttentionCall
from sparse_patch.methods.base.budget import BudgetedMethod, Count
from sparse_patch.methods.base.settings import Excluded
from sparse_patch.model_shape import LayerIndex
from sparse_patch.ops.selection.page_statistics import bound_scores, page_bounds
from sparse_patch.plans import PagePlan


class Quest(BudgetedMethod):
    """The top-k pages by an upper bound of their logits.

    Attributes:
        budget: tokens of a list, rounded up to pages.
        page_size: tokens per page. The bound gets loose with large pages.
        index_sharing: "q_head" or "kv_group"; see the module's text.
        group_score: how the bounds of a group's heads become one score, with `index_sharing: kv_group`.
        current_page: "forced", "scored" or "added"; see the module's text.
    """

    summary = "pages with the highest bound on their logits, in every layer"
    paper = "Quest, ICML 2024, arXiv 2406.10774"
    keeps_state = True

    method: Literal["quest"] = "quest"
    layers: Literal["all"] | list[LayerIndex] | Excluded = Excluded(exclude=[0, 1])
    budget: Annotated[int, Field(gt=0)] | None = 2048
    page_size: Literal[4, 8, 16, 32] = 16
    index_sharing: Literal["q_head", "kv_group"] = "q_head"
    group_score: Literal["sum", "max"] = "sum"
    current_page: Literal["forced", "scored", "added"] = "forced"

    @property
    def fewest(self) -> int:
        return self.page_size * (2 if self.current_page == "forced" else 3)

    def pages(self, tokens: Count) -> Count:
        """See `BudgetedMethod.pages`."""
        return -(-tokens // self.page_size) + (self.current_page == "added")

    def statistics(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bounds of the pages, brought up to date; see `DecodeMethod.statistics`."""
        return page_bounds(call, self.page_size)

    def choose(self, call: AttentionCall, statistics: tuple[torch.Tensor, torch.Tensor]) -> PagePlan:
        """Choose the top-k pages of every list; see `DecodeMethod.choose`."""
        lengths = call.lengths()
        scores = self._of_lists(call, bound_scores(call.q[:, :, -1], *statistics, lengths, self.page_size))
        if self.current_page != "scored":
            current = ((lengths - 1) // self.page_size)[:, None, None].expand(-1, scores.shape[1], 1)
            scores = scores.scatter_(-1, current, torch.inf)
        return PagePlan.of(call, *self.highest(call, scores, lengths, self.page_size), self.page_size)

    def _of_lists(self, call: AttentionCall, scores: torch.Tensor) -> torch.Tensor:
        """Turn the scores of query heads, `[B, Hq, Np]`, into scores of lists, `[B, L, Np]`."""
        if self.index_sharing == "q_head":
            return scores
        of_groups = scores.unflatten(1, (call.k.shape[1], call.group_size))
        return of_groups.sum(2) if self.group_score == "sum" else of_groups.amax(2)
