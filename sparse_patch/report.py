"""What was actually computed: the counters that the hook fills, and the typed report made from them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from sparse_patch.call import PHASES, Phase
from sparse_patch.files.writing import write_file
from sparse_patch.plans import PairsInWaiting

COUNTING = Lock()  # threads may share a model
MOST_WAITING = 64  # calls of a layer whose sizes are not added up yet; adding up takes a dozen operators for any number
Count = int | torch.Tensor  # a device tensor if only the device knows the number; read when a report is made


@dataclass(frozen=True)
class Work:
    """The size of one call, summed over the rows of the batch, padding excluded.

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
    fallback_in_graph: str | None = None  # the last reason recorded in a torch.compile graph
    waiting: list[tuple[Work, torch.Tensor | PairsInWaiting | None]] = field(default_factory=list)  # None: dense

    def add_dense(self, work: Work) -> None:
        self._add(work, None)

    def add_sparse(
        self,
        work: Work,
        attended_by_head: torch.Tensor | PairsInWaiting,
        decided_pairs: torch.Tensor | None = None,
    ) -> None:
        """Count a sparse call.

        Args:
            work: size of the call.
            attended_by_head: `SparsePlan.pairs_by_head`.
            decided_pairs: `BlockPlan.decided_pairs`.
        """
        self.sparse_calls += 1
        if decided_pairs is not None:
            assert torch.is_tensor(attended_by_head), "only plans of blocks decide more finely"
            self.surplus = self.surplus + attended_by_head.sum() - decided_pairs.sum()
        self._add(work, attended_by_head)

    def _add(self, work: Work, attended: torch.Tensor | PairsInWaiting | None) -> None:
        self.calls += 1
        self.waiting.append((work, attended))
        if len(self.waiting) >= MOST_WAITING:
            self._settle()

    def _settle(self) -> None:
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
            self._settle()
        return vars(self)

    def report(self) -> "PhaseReport":
        self._settle()
        causal, queries = int(self.causal), int(self.queries)
        by_head = [0] if self.attended_by_head is None else self.attended_by_head.tolist()
        attended = [int(self.attended_by_all) + pairs for pairs in by_head]
        mean = sum(attended) / len(attended)
        return PhaseReport(
            calls=self.calls,
            sparse_calls=self.sparse_calls,
            density=mean / causal if causal else None,
            density_by_head=[pairs / causal for pairs in attended] if causal and self.sparse_calls else [],
            attended=mean / queries if queries else None,
            dense=dict(self.dense),
            fallbacks=dict(self.fallbacks + Counter([self.fallback_in_graph] if self.fallback_in_graph else [])),
            dense_kernels=dict(self.dense_kernels),
            copying_calls=self.copying_calls,
            keeping_calls=self.keeping_calls,
            pairs=(mean, causal, queries),
            surplus=int(self.surplus) / len(attended),
        )


@dataclass
class LayerCounts:
    """The totals of one layer, and whether it also ran inside `torch.compile` graphs, whose calls are not counted."""

    prefill: PhaseCounts = field(default_factory=PhaseCounts)
    decode: PhaseCounts = field(default_factory=PhaseCounts)
    compiled: bool = False

    def of(self, phase: Phase) -> PhaseCounts:
        return self.prefill if phase == "prefill" else self.decode


class PhaseReport(BaseModel):
    """The report of one layer in one phase.

    Attributes:
        calls: number of attention calls, without those inside `torch.compile` graphs.
        sparse_calls: number of calls that ran a sparse plan.
        density: computed share of the causal triangle, mean over heads, dense calls included; None without calls.
        density_by_head: the same for each query head; empty if no call was sparse.
        attended: keys read per query token, mean over heads; None without calls.
        dense: reason -> number of calls that were dense by the configuration or by the model's design.
        fallbacks: reason -> number of calls that were dense because the method could not serve them. All calls inside
            `torch.compile` graphs count as one.
        dense_kernels: kernel -> number of calls in `dense` that ran on a faster kernel than the model's own; only with
            `dense: best`.
        copying_calls: number of calls in `sparse_calls` that read a cache which copies all its keys for every token.
        keeping_calls: number of calls in `sparse_calls` that read by spans from a cache which keeps all keys.
        pairs: (pairs computed, pairs of the causal triangle, queries); totals are made from these.
        surplus: computed pairs that the method did not choose but that share a block with a chosen pair; mean over
            heads. 0 for methods that decide on whole blocks.
    """

    calls: int
    sparse_calls: int
    density: float | None
    density_by_head: list[float]
    attended: float | None
    dense: dict[str, int]
    fallbacks: dict[str, int]
    dense_kernels: dict[str, int] = {}
    copying_calls: int = 0
    keeping_calls: int = 0
    pairs: tuple[float, int, int]
    surplus: float = 0.0


class LayerReport(BaseModel):
    """The report of one attention module: layer index, path in the model, method per phase, and what it computed.

    `compiled` tells whether it also ran inside `torch.compile` graphs, whose calls are not counted.
    """

    layer: int
    name: str
    prefill_method: str | None
    decode_method: str | None
    prefill: PhaseReport
    decode: PhaseReport
    compiled: bool = False

    def phase(self, phase: Phase) -> PhaseReport:
        return self.prefill if phase == "prefill" else self.decode


class SparsityReport(BaseModel):
    """What a patched model computed since it was patched, or since `reset_report`.

    `print(report)` shows a table; `report.model_dump_json()` and `report.save(path)` give JSON. `remarks` has the
    methods' remarks about their settings, for instance that they were not calibrated for the model.
    """

    config: dict[str, Any]
    source: str
    fingerprint: str
    hook_active: bool
    versions: dict[str, str]
    layers: list[LayerReport]
    remarks: list[str] = []

    def pairs(self, phase: Phase) -> tuple[float, int, int]:
        """(Pairs computed, pairs of the causal triangle, queries) over all layers; pairs are means over heads."""
        computed, causal, queries = zip(*(layer.phase(phase).pairs for layer in self.layers), strict=True)
        return sum(computed), sum(causal), sum(queries)

    def density(self, phase: Phase = "prefill") -> float | None:
        """Computed share of the causal triangle over all layers, dense layers included; None without calls."""
        computed, causal, _ = self.pairs(phase)
        return computed / causal if causal else None

    def decided(self, phase: Phase = "prefill") -> float | None:
        """`density`, but counting only the pairs that the method chose, not whole blocks: the density of its paper."""
        computed, causal, _ = self.pairs(phase)
        surplus = sum(layer.phase(phase).surplus for layer in self.layers)
        return (computed - surplus) / causal if causal else None

    def attended(self, phase: Phase = "decode") -> float | None:
        """Mean number of keys read per query token and layer; None without calls."""
        computed, _, queries = self.pairs(phase)
        return computed / queries if queries else None

    def fallbacks(self, phase: Phase | None = None) -> dict[str, int]:
        """Reason -> number of calls over all layers that ran densely because the method could not serve them."""
        phases = PHASES if phase is None else (phase,)
        return _sum(layer.phase(name).fallbacks for layer in self.layers for name in phases)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON; raise WriteError if it cannot be written."""
        write_file(Path(path), self.model_dump_json(indent=2) + "\n")

    def __str__(self) -> str:
        console = Console(width=100, color_system=None)
        with console.capture() as capture:
            console.print(self.table(), *self.notes(), sep="\n", markup=False, highlight=False)
        return capture.get().rstrip()

    def table(self) -> Table:
        """A table with one line per layer."""
        table = Table(title=f"{self.source} ({self.fingerprint})", title_justify="left")
        for column in (
            "layer",
            "sparse prefills",
            "density",
            "min-max head",
            "sparse decodes",
            "keys per decoded token",
        ):
            table.add_column(column, justify="right")
        for layer in self.layers:
            heads = layer.prefill.density_by_head
            table.add_row(
                str(layer.layer),
                f"{layer.prefill.sparse_calls} of {layer.prefill.calls}",
                _number(layer.prefill.density, 3),
                f"{min(heads):.2f}-{max(heads):.2f}" if heads else "",
                f"{layer.decode.sparse_calls} of {layer.decode.calls}",
                _number(layer.decode.attended, 0),
            )
        table.add_row("all", "", _number(self.density(), 3), "", "", _number(self.attended(), 0))
        return table

    def notes(self) -> list[str]:
        """The remarks, one line per reason why calls were dense, and a warning if the hook is no longer active."""
        notes = list(self.remarks)
        for phase in PHASES:
            if (decided := self.decided(phase)) != self.density(phase):
                notes.append(
                    f"{phase}: density of the decisions {_number(decided, 3)}, of the blocks that hold them "
                    f"{_number(self.density(phase), 3)}"
                )
            for kind in ("dense", "fallbacks"):
                total = _sum(getattr(layer.phase(phase), kind) for layer in self.layers)
                label = "dense" if kind == "dense" else "FALLBACK to dense"
                notes += [f"{phase}: {label}, {reason}: {count} calls" for reason, count in total.items()]
            kernels = _sum(layer.phase(phase).dense_kernels for layer in self.layers)
            notes += [f"{phase}: {count} of the dense calls on {kernel}" for kernel, count in kernels.items()]
            if copying := sum(layer.phase(phase).copying_calls for layer in self.layers):
                notes.append(
                    f"{phase}: {copying} sparse calls on a DynamicCache, which copies all its keys for every token; "
                    "let generate make the cache, or pass growing_cache(model.config)"
                )
            if keeping := sum(layer.phase(phase).keeping_calls for layer in self.layers):
                notes.append(
                    f"{phase}: {keeping} calls read by spans from a cache that keeps all keys, which saves no memory; "
                    "let generate make the cache, or pass span_cache(model, max_length)"
                )
        if compiled := sum(layer.compiled for layer in self.layers):
            notes.append(
                f"{compiled} layers also ran inside compiled graphs, whose calls are not counted; "
                "generate(disable_compile=True) counts them"
            )
        if not self.hook_active:
            notes.append("the hook is not active: the attention implementation was changed after patch_model")
        return notes


def merged(reports: Sequence[SparsityReport]) -> SparsityReport:
    """Merge the reports of several processes that ran the same model and configuration.

    Raises:
        ValueError: the reports have different configurations.
    """
    first = reports[0]
    if any(report.fingerprint != first.fingerprint for report in reports):
        raise ValueError("reports of different configurations cannot be merged")
    layers = [
        layers[0].model_copy(
            update={
                "prefill": _merged_phase([layer.prefill for layer in layers]),
                "decode": _merged_phase([layer.decode for layer in layers]),
                "compiled": any(layer.compiled for layer in layers),
            }
        )
        for layers in zip(*(report.layers for report in reports), strict=True)
    ]
    return first.model_copy(update={"layers": layers, "hook_active": all(report.hook_active for report in reports)})


def _merged_phase(parts: Sequence[PhaseReport]) -> PhaseReport:
    computed, causal, queries = (sum(values) for values in zip(*(part.pairs for part in parts), strict=True))
    heads = max(len(part.density_by_head) for part in parts)
    by_head = [
        sum(part.pairs[1] * (part.density_by_head or [part.density or 0.0] * heads)[head] for part in parts)
        for head in range(heads)
    ]
    return PhaseReport(
        calls=sum(part.calls for part in parts),
        sparse_calls=sum(part.sparse_calls for part in parts),
        density=computed / causal if causal else None,
        density_by_head=[pairs / causal for pairs in by_head],
        attended=computed / queries if queries else None,
        dense=_sum(part.dense for part in parts),
        fallbacks=_sum(part.fallbacks for part in parts),
        dense_kernels=_sum(part.dense_kernels for part in parts),
        copying_calls=sum(part.copying_calls for part in parts),
        keeping_calls=sum(part.keeping_calls for part in parts),
        pairs=(computed, int(causal), int(queries)),
        surplus=sum(part.surplus for part in parts),
    )


def _total(counts: Sequence[Count]) -> Count:
    """The sum of counts, without a host sync."""
    on_device = [count for count in counts if isinstance(count, torch.Tensor)]
    on_host = sum(count for count in counts if isinstance(count, int))
    return torch.stack(on_device).sum() + on_host if on_device else on_host


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
