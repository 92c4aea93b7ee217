"""What the calls of a graph add to the report whenever the graph runs."""

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch

from sparse_patch.integration.step import StepCall, work_of
from sparse_patch.plans import SparsePlan
from sparse_patch.report import COUNTING, PhaseCounts, Work


class Tally:
    """The calls of one graph, counted without a host sync.

    What follows from the number of tokens is computed on the host when the report is made. Pairs that the keys decide
    about are added up by the graph, on the device.
    """

    def __init__(self, recording: Any, calls: Sequence[StepCall], starts: Sequence[int], totals: torch.Tensor) -> None:
        """
        Args:
            recording: the graph.
            calls: the calls of a step.
            starts: first real token of each row.
            totals: zeros, int64 `[layers, Hq]`, made before the graph.
        """
        self._recording = ref(recording)
        self._calls, self._starts, self._totals = calls, starts, totals
        self._runs: list[list[int]] = []  # [tokens before the first step, number of steps], for consecutive steps
        plans = {id(call.plan): call.plan for call in calls if call.plan is not None}
        token = torch.ones(1, dtype=torch.int64)
        self._counted = {key: plan for key, plan in plans.items() if plan.pairs_at(token) is None}

    @property
    def is_alive(self) -> bool:
        """Whether the graph can still run."""
        return self._recording() is not None

    def add_up(self) -> None:
        """Add the pairs of the current step on the device; to be captured with the step."""
        for total, plan in zip(self._totals, self._counted.values(), strict=False):
            total += plan.pairs_by_head

    def replayed(self, length: int) -> None:
        """Note a step that had `length` tokens before it."""
        if self._runs and sum(self._runs[-1]) == length:
            self._runs[-1][1] += 1
        else:
            self._runs.append([length, 1])

    def settle(self) -> None:
        """Move what was counted into the counts of the layers."""
        runs, self._runs = self._runs, []
        if not runs:
            return
        totals = self._totals.clone()
        self._totals.zero_()
        number = {key: at for at, key in enumerate(self._counted)}
        steps = sum(count for _, count in runs)
        work = _sum([work_of(self._starts, length, count) for length, count in runs])
        lengths = torch.tensor([length + 1 + i - at for length, n in runs for i in range(n) for at in self._starts])
        by_head = {
            id(call.plan): totals[number[id(call.plan)]]
            if id(call.plan) in number
            else _known(call.plan, lengths, totals)
            for call in self._calls
            if call.plan is not None
        }
        with COUNTING:
            for call in self._calls:
                counts = call.state.counts.of(call.phase)
                _count(counts, call, work, by_head.get(id(call.plan)), steps)


def _known(plan: SparsePlan, lengths: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    pairs = plan.pairs_at(lengths)
    assert pairs is not None, "else the graph counts them"
    return pairs.to(like.device)


def _sum(works: Sequence[Work]) -> Work:
    queries, pairs = sum(int(work.queries) for work in works), sum(int(work.causal) for work in works)
    return Work(queries, pairs, pairs)


def _count(counts: PhaseCounts, call: StepCall, work: Work, by_head: torch.Tensor | None, steps: int) -> None:
    """Count one call of each of some steps."""
    if by_head is None:
        assert call.dense is not None
        counts.add_dense(work, steps)
        counts.dense[call.dense] += steps
        counts.dense_kernels["page_decode"] += steps
        return
    assert call.plan is not None
    counts.add_sparse(work, by_head, calls=steps)
    if call.plan.known_beforehand:
        counts.keeping_calls += steps if call.phase == "decode" and call.keeps_all else 0
