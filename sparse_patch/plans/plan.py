"""The interface of every plan."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import Self

from sparse_patch.plans.once import once


@dataclass(frozen=True)
class Dense:
    """Read every key: the answer of a method when sparsity saves nothing (short prompt, `gamma: 1`, ...)."""

    reason: str

    def density(self) -> float:
        return 1.0


class SparsePlan(ABC):
    """Which keys each query of a call reads. Each kind of plan has one op in `ops.attention` that executes it.

    Attributes:
        known_beforehand: whether the plan follows from positions only, so that a cache may forget unread keys.
        decided_pairs: causal pairs that the method decided to read, if its decision is finer than the plan, int64
            `[B, Hq]`; None if the plan is the decision. For the report.
    """

    known_beforehand: ClassVar[bool] = False
    decided_pairs: torch.Tensor | None = None

    @abstractmethod
    def mask(self) -> torch.Tensor:
        """The plan as a mask of tokens, bool `[B, Hq, Sq, Skv]`: for the oracle and for pictures, N x N large."""

    @abstractmethod
    def computed_pairs(self) -> torch.Tensor:
        """Causal (query, key) pairs of real tokens that the plan computes, int64 `[B, Hq]`."""

    @abstractmethod
    def causal_pairs(self) -> torch.Tensor:
        """All causal (query, key) pairs of real tokens, int64 `[B]`."""

    @abstractmethod
    def block_map(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks that one query head of the first row reads, for pictures.

        Returns:
            The blocks with a key that is read, and the causal blocks: bool `[query blocks, key blocks]`, on the CPU.
        """

    def pairs_at(self, lengths: torch.Tensor) -> torch.Tensor | None:
        """Pairs that a plan like this computes for one query in each of some rows, if only their lengths decide.

        Args:
            lengths: keys of each row up to the query, int64 `[N]`, on any device.

        Returns:
            Summed over the rows, int64 `[Hq]` on that device; None if the keys decide too.
        """
        return None

    @property
    def pairs_by_head(self) -> "torch.Tensor | PairsInWaiting":
        """`computed_pairs`, summed over the batch; counted later if the plan can be counted together with others."""
        return self._pairs_now if self.stacks_with is None else PairsInWaiting(self)

    @once
    def _pairs_now(self) -> torch.Tensor:
        """Int64 `[Hq]`; computed once, because layers may share a plan."""
        return self.computed_pairs().sum(0)

    def add_pairs(self, total: torch.Tensor) -> None:
        """Add `computed_pairs`, summed over the batch, to `total`, int64 `[Hq]`, in place and at once."""
        total += self._pairs_now

    @property
    def stacks_with(self) -> Hashable | None:
        """Plans that have the same value here can be stacked; None if the plan cannot, or is too large to be kept."""
        return None

    def stacked(self, others: Sequence[Self]) -> Self:
        """This plan and others as one plan, the rows of one batch. Only its `computed_pairs` has a meaning."""
        raise NotImplementedError(f"{type(self).__name__} cannot be stacked")

    def density(self) -> torch.Tensor:
        """Share of the causal pairs that is computed, float32 `[B, Hq]`."""
        return self.computed_pairs().float() / self.causal_pairs()[:, None].clamp(min=1).float()


Plan = SparsePlan | Dense


@dataclass(frozen=True)
class PairsInWaiting:
    """The pairs of a plan by query head, not counted yet: it takes a dozen small operators, for one plan or many."""

    plan: SparsePlan

    @staticmethod
    def total(waiting: Sequence["PairsInWaiting"]) -> torch.Tensor:
        """Sum of the pairs of one plan or more, int64 `[Hq]`, on the device."""
        stacks: dict[Hashable, list[SparsePlan]] = {}
        for each in waiting:
            stacks.setdefault((type(each.plan), each.plan.stacks_with), []).append(each.plan)
        totals = [first.stacked(others).computed_pairs().sum(0) for first, *others in stacks.values()]
        return totals[0] if len(totals) == 1 else torch.stack(totals).sum(0)
