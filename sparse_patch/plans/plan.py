"""The interface of every plan."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

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

    @once
    def pairs_by_head(self) -> torch.Tensor:
        """`computed_pairs`, summed over the batch, int64 `[Hq]`; computed once, because layers may share a plan."""
        return self.computed_pairs().sum(0)

    def add_pairs(self, total: torch.Tensor) -> None:
        """Add `pairs_by_head` to `total`, int64 `[Hq]`, in place."""
        total += self.pairs_by_head

    def density(self) -> torch.Tensor:
        """Share of the causal pairs that is computed, float32 `[B, Hq]`."""
        return self.computed_pairs().float() / self.causal_pairs()[:, None].clamp(min=1).float()


Plan = SparsePlan | Dense
