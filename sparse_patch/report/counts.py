"""The counters that the hook fills, without a host sync."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

import torch

from sparse_patch.call import Phase
from sparse_patch.plans import PairsInWaiting

COUNTING = Lock()  # threads may share a model
MOST_WAITING = 64  # calls of a layer whose sizes are not added up yet; adding up takes a dozen operators for any number
Count = int | torch.Tensor  # a device tensor if only the device knows the number; read when a report is made


class Work(NamedTuple):
    """The size of one call, summed over the rows of the batch, padding excluded. A graph can hand it to the host.

    Attributes:
        queries: query tokens.
        causal: (query, key) pairs of the causal triangle.
        attended: pairs that the model's own dense attention reads; fewer than `causal` in sliding-window layers.
    """

    queries: Count
    causal: Count
    attended: Count


@dataclass
class PhaseCounts:
    """Running totals of one layer in one phase, without a host sync until a report is made.

    Sizes of calls wait to be added up, many at once: a decode step has no time for it.
    """

    calls: int = 0
    sparse_calls: int = 0
    queries: Count = 0
    causal: Count = 0
    attended_by_all: Count = 0
    attended_by_head: torch.Tensor | None = None
    surplus: Count = 0
    dense: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    dense_kernels: Counter[str] = field(default_factory=Counter)
    copying_calls: int = 0
    keeping_calls: int = 0
    uncounted_fallback: str | None = None  # the last reason of a call in a `torch.compile` graph that was not counted
    waiting: list[tuple[Work, torch.Tensor | PairsInWaiting | None]] = field(default_factory=list)  # None: dense

    def add_dense(self, work: Work, calls: int = 1) -> None:
        """Count dense calls of this size in all."""
        self._add(work, None, calls)

    def add_sparse(
        self,
        work: Work,
        attended_by_head: torch.Tensor | PairsInWaiting,
        decided_pairs: torch.Tensor | None = None,
        calls: int = 1,
    ) -> None:
        """Count sparse calls.

        Args:
            work: size of the calls in all.
            attended_by_head: `SparsePlan.pairs_by_head`.
            decided_pairs: `BlockPlan.decided_pairs`.
            calls: number of calls.
        """
        self.sparse_calls += calls
        if decided_pairs is not None:
            assert torch.is_tensor(attended_by_head), "only plans of blocks decide more finely"
            self.surplus = self.surplus + attended_by_head.sum() - decided_pairs.sum()
        self._add(work, attended_by_head, calls)

    def _add(self, work: Work, attended: torch.Tensor | PairsInWaiting | None, calls: int) -> None:
        self.calls += calls
        self.waiting.append((work, attended))
        if len(self.waiting) >= MOST_WAITING:
            self.settle()

    def settle(self) -> None:
        """Add up what waits."""
        waiting, self.waiting = self.waiting, []
        self.queries = _total([self.queries, *(work.queries for work, _ in waiting)])
        self.causal = _total([self.causal, *(work.causal for work, _ in waiting)])
        of_dense = (work.attended for work, attended in waiting if attended is None)
        self.attended_by_all = _total([self.attended_by_all, *of_dense])
        known = [] if self.attended_by_head is None else [self.attended_by_head]
        known += [attended for _, attended in waiting if torch.is_tensor(attended)]
        if later := [attended for _, attended in waiting if isinstance(attended, PairsInWaiting)]:
            known.append(PairsInWaiting.total(later))
        if known:
            self.attended_by_head = known[0] if len(known) == 1 else torch.stack(known).sum(0)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which need no plans."""
        with COUNTING:
            self.settle()
        return vars(self)


@dataclass
class LayerCounts:
    """The totals of one layer.

    Attributes:
        compiled: whether calls ran inside `torch.compile` graphs.
        uncounted: whether such calls could not be counted.
    """

    prefill: PhaseCounts = field(default_factory=PhaseCounts)
    decode: PhaseCounts = field(default_factory=PhaseCounts)
    compiled: bool = False
    uncounted: bool = False

    def of(self, phase: Phase) -> PhaseCounts:
        return self.prefill if phase == "prefill" else self.decode


@dataclass
class GraphCounts:
    """What became of the decode steps of a model on a GPU.

    Attributes:
        captures: number of CUDA graphs captured.
        capture_s: seconds that this took.
        replays: steps that ran as a graph.
        eager: reason -> steps that could not.
    """

    captures: int = 0
    capture_s: float = 0.0
    replays: int = 0
    eager: Counter[str] = field(default_factory=Counter)


def _total(counts: Sequence[Count]) -> Count:
    """The sum of counts, without a host sync."""
    on_device = [count for count in counts if isinstance(count, torch.Tensor)]
    on_host = sum(count for count in counts if isinstance(count, int))
    return torch.stack(on_device).sum() + on_host if on_device else on_host
