"""What decode methods with a budget share: how many keys a row may read, and when the budget covers all of them."""

import math
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from sparse_patch.call import AttentionCall
from sparse_patch.errors import FieldError
from sparse_patch.files.reading import MOST
from sparse_patch.methods.base.settings import DecodeMethod
from sparse_patch.ops.selection.top_pages import top_pages
from sparse_patch.ops.selection.top_pages.torch import with_forced
from sparse_patch.plans import Dense

Count = TypeVar("Count", int, torch.Tensor)


class BudgetedMethod(DecodeMethod):
    """A decode method that reads a limited number of keys. Exactly one of `budget` and `budget_ratio` is set.

    A row of the batch with no more keys than its budget reads all of them.

    Attributes:
        budget: tokens that a list holds, including those that are always read.
        budget_ratio: the same as a share of the row's keys, in (0, 1]. The selection then sorts, which is slower.
    """

    budget: Annotated[int, Field(gt=0, le=MOST)] | None = 2048
    budget_ratio: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _a_ratio_replaces_the_default(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("budget_ratio") is not None and "budget" not in data:
            return {**data, "budget": None}
        return data

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if self.budget is None and self.budget_ratio is None:
            raise FieldError("budget", "missing", "give budget in tokens or budget_ratio as a share of the keys")
        if self.budget is not None and self.budget_ratio is not None:
            raise FieldError("budget_ratio", f"budget is {self.budget} already", "set budget: null to use a ratio")
        if self.budget is not None and self.budget < self.fewest:
            raise FieldError("budget", f"{self.budget} is below {self.fewest}, the tokens that a list needs at least")
        return self

    @property
    def fewest(self) -> int:
        """Minimum number of tokens of a list; smaller budgets are refused, smaller shares are raised to it."""
        return 1

    def pages(self, tokens: Count) -> Count:
        """The number of ranked pages that a budget of `tokens` tokens allows."""
        return tokens

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """Short caches, several queries at a time (speculative decoding), and caches that fit the budget."""
        if short := super().why_dense(call):
            return short
        if call.q.shape[2] > 1:
            return Dense("more than one query")
        if call.decisive_length <= self.most(call.decisive_length):
            return Dense("no more keys than the budget")
        return None

    def most(self, length: int) -> int:
        """The budget in tokens of a row with `length` keys."""
        if self.budget is not None:
            return self.budget
        assert self.budget_ratio is not None, "checked by _one_budget"
        return max(math.ceil(self.budget_ratio * length), self.fewest)

    def tokens(self, lengths: torch.Tensor) -> torch.Tensor:
        """The budgets in tokens of rows with `lengths` keys, on the device; both int64 `[B]`."""
        if self.budget is not None:
            return torch.full_like(lengths, self.budget)
        assert self.budget_ratio is not None, "checked by _one_budget"
        return lengths.double().mul(self.budget_ratio).ceil().long().clamp(min=self.fewest)

    def highest(
        self,
        call: AttentionCall,
        scores: torch.Tensor,
        limits: torch.Tensor,
        page_size: int = 1,
        *,
        spared: int = 0,
        first: int = 0,
        last: int | torch.Tensor = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The pages with the highest scores, as many as each row's budget allows.

        Args:
            call: the call.
            scores: float32 `[B, L, N]`.
            limits: real pages of each row, or their tokens if `page_size` is given, int64 `[B]`; scores after them have
                no meaning.
            page_size: tokens per page, if `limits` are tokens.
            spared: what is subtracted from the limits.
            first: first pages of each row that are always read.
            last: last pages that are always read; with a `budget_ratio` also as many for each row, int64 `[B]`.

        Returns:
            Arguments of `PagePlan.of`: pages, int32 `[B, L, K]`, ascending, and counts, int32 `[B, L]`.
        """
        most = self.pages(self.most(call.kv_length))
        if self.budget is not None:
            assert isinstance(last, int), "rows have the same budget"
            return top_pages(scores, limits, most, page_size, spared=spared, first=first, last=last)
        real = (-(-(limits - spared) // page_size)).clamp(0, scores.shape[-1])
        scores = with_forced(scores, real[:, None], first, last[:, None] if isinstance(last, torch.Tensor) else last)
        return _highest(scores, real, self.pages(self.tokens(call.lengths())), most)


def _highest(
    scores: torch.Tensor, limits: torch.Tensor, wanted: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`top_pages` with a separate number of pages for each row: `wanted` `[B]`, each at most `most`."""
    number = torch.arange(scores.shape[-1], device=scores.device)
    inside = scores.masked_fill(number >= limits[:, None, None], -torch.inf)
    order = inside.argsort(dim=-1, descending=True, stable=True)[..., :most]
    counts = torch.minimum(wanted, limits)[:, None].expand(scores.shape[:2])
    rank = torch.arange(order.shape[-1], device=scores.device)
    pages = order.masked_fill(rank >= counts[..., None], scores.shape[-1]).sort(-1).values
    return pages.clamp(max=scores.shape[-1] - 1).int(), counts.int()
