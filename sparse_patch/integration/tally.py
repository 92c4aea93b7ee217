"""What the calls of a graph add to the report whenever the graph runs."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import ref

import torch

from sparse_patch.call import Phase
from sparse_patch.integration.step import StepCall, work_of
from sparse_patch.plans import SparsePlan
from sparse_patch.report import COUNTING, PhaseCounts, Work


@dataclass(frozen=True)
class _Entry:
    """One call of the step, without its tensors: a report must not keep the memory of a cache.

    Attributes:
        state: the `LayerState` of the attention module.
        phase: the phase of the call.
        plan: number of the plan among the step's plans; None if the call was dense.
        dense: why the call was dense.
        keeps_all: whether the call read by spans from a cache that keeps every key.
        window: see `StepCall`.
    """

    state: Any
    phase: Phase
    plan: int | None
    dense: str | None
    keeps_all: bool
    window: int | None


class Tally:
    """The calls of one graph, counted without a host sync.

    What follows from the number of tokens is computed on the host when the report is made. Pairs that the keys decide
    about are added up by the graph, on the device.
    """

    def __init__(self, recording: Any, calls: Sequence[StepCall], starts: Sequence[int], totals: torch.Tensor) -> None:
        """Add the pairs of the step on the device, which is captured with the step.

        Args:
            recording: the graph.
            calls: the calls of a step.
            starts: first real token of each row.
            totals: zeros, int64 `[layers, Hq]`, made before the graph.
        """
        self._recording, self._starts, self._totals = ref(recording), starts, totals
        self._runs: list[list[int]] = []  # [tokens before the first step, number of steps], for consecutive steps
        plans = {id(call.plan): call.plan for call in calls if call.plan is not None}
        number = {key: at for at, key in enumerate(plans)}
        self._plans = [_without_tensors(plan) if _is_known(plan) else None for plan in plans.values()]  # None: counted
        self._entries = [_entry(call, number) for call in calls]
        heads = {id(call.plan): call.call.q.shape[1] for call in calls if call.call is not None}
        self._heads = [heads[key] for key in plans]
        for total, plan, known, of_plan in zip(totals, plans.values(), self._plans, self._heads, strict=False):
            if known is None:
                plan.add_pairs(total[:of_plan])

    @property
    def is_alive(self) -> bool:
        """Whether the graph can still run."""
        return self._recording() is not None

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
        steps = sum(count for _, count in runs)
        works = {window: self._work(runs, window) for window in {entry.window for entry in self._entries}}
        lengths = torch.tensor([length + 1 + i - at for length, n in runs for i in range(n) for at in self._starts])
        pairs = [
            total[:heads] if plan is None else _known_pairs(plan, lengths).to(totals.device)
            for plan, heads, total in zip(self._plans, self._heads, totals, strict=False)
        ]
        with COUNTING:
            for entry in self._entries:
                _count(entry, works[entry.window], None if entry.plan is None else pairs[entry.plan], steps)

    def _work(self, runs: list[list[int]], window: int | None) -> Work:
        """The dense work of some runs."""
        works = [work_of(self._starts, length, count, window) for length, count in runs]
        queries, causal = sum(int(work.queries) for work in works), sum(int(work.causal) for work in works)
        return Work(queries, causal, sum(int(work.attended) for work in works))


def _entry(call: StepCall, number: dict[int, int]) -> _Entry:
    keeps_all = call.plan is not None and call.plan.known_beforehand and call.phase == "decode" and call.keeps_all
    plan = None if call.plan is None else number[id(call.plan)]
    return _Entry(call.state, call.phase, plan, call.dense, keeps_all, call.window)


def _is_known(plan: SparsePlan) -> bool:
    """Whether the pairs of a plan follow from the number of tokens."""
    return plan.pairs_at(torch.ones(1, dtype=torch.int64)) is not None


def _without_tensors(plan: SparsePlan) -> SparsePlan:
    """A plan of which only `pairs_at` is asked."""
    here: Any = plan
    tensors = [field.name for field in fields(here) if torch.is_tensor(getattr(plan, field.name))]
    light: SparsePlan = replace(here, **{name: torch.empty(0, dtype=torch.int64) for name in tensors})
    return light


def _known_pairs(plan: SparsePlan, lengths: torch.Tensor) -> torch.Tensor:
    pairs = plan.pairs_at(lengths)
    assert pairs is not None, "see _is_known"
    return pairs


def _count(entry: _Entry, work: Work, by_head: torch.Tensor | None, steps: int) -> None:
    """Count one call of each of some steps."""
    counts: PhaseCounts = entry.state.counts.of(entry.phase)
    if by_head is None:
        assert entry.dense is not None, "a call without a plan"
        counts.add_dense(work, steps)
        counts.dense[entry.dense] += steps
        counts.dense_kernels["page_decode"] += steps
        return
    counts.add_sparse(work, by_head, calls=steps)
    counts.keeping_calls += steps if entry.keeps_all else 0
