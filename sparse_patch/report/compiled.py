"""The counts of calls inside `torch.compile` graphs, which the graphs themselves add up on the device."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparse_patch.call import Phase
from sparse_patch.kernels.inference_mode import OrdinaryState, ordinary_tensors
from sparse_patch.plans import SparsePlan
from sparse_patch.report.counts import Count, LayerCounts, PhaseCounts, Work

_CALLS = ("sparse", "dense", "fallback", "kernel", "copying", "keeping")
_SIZES = ("queries", "causal", "attended", "surplus")
_FIELDS = (*_CALLS, *_SIZES)


@dataclass
class PhaseCompiledCounts(OrdinaryState):
    """What graphs counted in one layer and one phase since the last report.

    The tensors are made outside of graphs, and graphs write to them in place. The strings are the same in every run of
    a graph; the graph that ran last has written them.

    Attributes:
        numbers: number of calls of each kind, and sizes of all calls together; int64 `[fields]`.
        by_head: pairs of sparse calls, int64 `[Hq]`.
        dense: why a call was dense by design.
        fallback: why a call was dense because the method could not serve it.
        kernel: the kernel that ran a dense call instead of the model's own.
    """

    numbers: torch.Tensor
    by_head: torch.Tensor
    dense: str = ""
    fallback: str = ""
    kernel: str = ""

    @classmethod
    def zeros(cls, heads: int, device: torch.device) -> "PhaseCompiledCounts":
        """No counts yet, for calls with this number of query heads."""
        with ordinary_tensors():
            numbers, by_head = (torch.zeros(n, dtype=torch.int64, device=device) for n in (len(_FIELDS), heads))
        for tensor in (numbers, by_head):
            torch._dynamo.mark_static_address(tensor)  # a CUDA graph writes only to tensors that stay in place
        return cls(numbers, by_head)

    def add_sparse(self, work: Work, plan: SparsePlan, copying: bool, keeping: bool) -> None:
        """Count a sparse call.

        Args:
            work: its size.
            plan: what it read.
            copying: whether the cache copies all its keys for every token.
            keeping: whether spans were read from a cache that keeps all keys.
        """
        sizes = {"queries": work.queries, "causal": work.causal}
        if plan.decided_pairs is not None:
            sizes["surplus"] = plan.computed_pairs().sum() - plan.decided_pairs.sum()
        plan.add_pairs(self.by_head)
        self._add(["sparse", *["copying"] * copying, *["keeping"] * keeping], sizes)

    def add_dense(self, work: Work, reason: str, is_fallback: bool) -> None:
        """Count a dense call."""
        if is_fallback:
            self.fallback = reason
        else:
            self.dense = reason
        sizes = {"queries": work.queries, "causal": work.causal, "attended": work.attended}
        self._add(["fallback" if is_fallback else "dense"], sizes)

    def add_kernel(self, kernel: str) -> None:
        """Count the kernel of a dense call."""
        self.kernel = kernel
        self._add(["kernel"], {})

    def _add(self, calls: Sequence[str], sizes: dict[str, Count]) -> None:
        """Add to all fields at once: on a GPU a graph does it in one small kernel, or in one for several layers."""
        field = torch.arange(len(_FIELDS), device=self.numbers.device)
        counted = {**dict.fromkeys(calls, 1), **sizes}
        self.numbers.add_(sum((field == _FIELDS.index(name)) * value for name, value in counted.items()))

    def move_to(self, counts: PhaseCounts) -> None:
        """Add everything to the other counts and begin again at zero, in place. Waits for the device."""
        found = dict(zip(_FIELDS, self.numbers.tolist(), strict=True))
        if not any(found.values()):
            return
        work = Work(found["queries"], found["causal"], found["attended"])
        counts.add_dense(work, calls=found["dense"] + found["fallback"])
        if found["sparse"]:
            counts.add_sparse(Work(0, 0, 0), self.by_head.clone(), calls=found["sparse"])
        counts.dense += Counter({self.dense: found["dense"]})
        counts.fallbacks += Counter({self.fallback: found["fallback"]})
        counts.dense_kernels += Counter({self.kernel: found["kernel"]})
        counts.copying_calls += found["copying"]
        counts.keeping_calls += found["keeping"]
        counts.surplus = counts.surplus + found["surplus"]
        self.numbers.zero_()
        self.by_head.zero_()


@dataclass
class CompiledCounts:
    """What graphs counted in one layer since the last report, by phase."""

    prefill: PhaseCompiledCounts
    decode: PhaseCompiledCounts

    @classmethod
    def zeros(cls, heads: int, device: torch.device) -> "CompiledCounts":
        """No counts yet, for calls with this number of query heads."""
        return cls(PhaseCompiledCounts.zeros(heads, device), PhaseCompiledCounts.zeros(heads, device))

    def of(self, phase: Phase) -> PhaseCompiledCounts:
        return self.prefill if phase == "prefill" else self.decode

    def serves(self, query: torch.Tensor) -> bool:
        """Whether calls with such queries, `[B, Hq, Sq, D]`, can be counted."""
        by_head = self.prefill.by_head
        return by_head.device == query.device and by_head.shape[0] == query.shape[1]

    def move_to(self, counts: LayerCounts) -> None:
        """Add everything to the other counts and begin again at zero, in place. Waits for the device."""
        self.prefill.move_to(counts.prefill)
        self.decode.move_to(counts.decode)
