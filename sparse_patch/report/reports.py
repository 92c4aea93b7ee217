"""The typed report made from the counters, and its table."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from sparse_patch.call import PHASES, Phase
from sparse_patch.files.writing import write_file
from sparse_patch.report.counts import GraphCounts, PhaseCounts


class GraphReport(BaseModel):
    """How decode steps ran on a GPU; see `GraphCounts` for the fields. All are 0 on a CPU."""

    captures: int = 0
    capture_s: float = 0.0
    replays: int = 0
    eager: dict[str, int] = {}

    @classmethod
    def of(cls, counts: GraphCounts) -> "GraphReport":
        return cls(**{**vars(counts), "eager": dict(counts.eager)})


class PhaseReport(BaseModel):
    """The report of one layer in one phase.

    Attributes:
        calls: number of attention calls.
        sparse_calls: number of calls that ran a sparse plan.
        density: computed share of the causal triangle, mean over heads, dense calls included; None without calls.
        density_by_head: the same for each query head; empty if no call was sparse.
        attended: keys read per query token, mean over heads; None without calls.
        dense: reason -> number of calls that were dense by the configuration or by the model's design.
        fallbacks: reason -> number of calls that were dense because the method could not serve them. Calls that could
            not be counted, see `LayerReport`, are one call here.
        dense_kernels: kernel -> number of calls in `dense` that ran on a faster kernel than the model's own: with
            `dense: best`, in decode steps and in corrections of the cache.
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

    @classmethod
    def of(cls, counts: PhaseCounts) -> "PhaseReport":
        """The report of what was counted; reads from the device."""
        counts.settle()
        causal, queries = int(counts.causal), int(counts.queries)
        by_head = [0] if counts.attended_by_head is None else counts.attended_by_head.tolist()
        attended = [int(counts.attended_by_all) + pairs for pairs in by_head]
        mean = sum(attended) / len(attended)
        return cls(
            calls=counts.calls,
            sparse_calls=counts.sparse_calls,
            density=mean / causal if causal else None,
            density_by_head=[pairs / causal for pairs in attended] if causal and counts.sparse_calls else [],
            attended=mean / queries if queries else None,
            dense=dict(counts.dense),
            fallbacks=dict(
                counts.fallbacks + Counter([counts.uncounted_fallback] if counts.uncounted_fallback else [])
            ),
            dense_kernels=dict(counts.dense_kernels),
            copying_calls=counts.copying_calls,
            keeping_calls=counts.keeping_calls,
            pairs=(mean, causal, queries),
            surplus=int(counts.surplus) / len(attended),
        )


class LayerReport(BaseModel):
    """The report of one attention module: layer index, path in the model, method per phase, and what it computed.

    `compiled` tells whether calls ran inside `torch.compile` graphs. They are counted like any others, unless
    `uncounted`: the model has moved to another device since it was patched, or was exported.
    """

    layer: int
    name: str
    prefill_method: str | None
    decode_method: str | None
    prefill: PhaseReport
    decode: PhaseReport
    compiled: bool = False
    uncounted: bool = False

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
    graphs: GraphReport = GraphReport()
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
        if self.graphs.captures:
            notes.append(
                f"decode: {self.graphs.replays} steps ran as CUDA graphs; {self.graphs.captures} were captured, in "
                f"{self.graphs.capture_s:.2f} s"
            )
        notes += [f"decode: {count} steps without a CUDA graph: {why}" for why, count in self.graphs.eager.items()]
        if uncounted := sum(layer.uncounted for layer in self.layers):
            notes.append(
                f"{uncounted} layers also ran inside compiled graphs, whose calls are not counted; patch the model on "
                "the device where it runs"
            )
        if not self.hook_active:
            notes.append("the hook is not active: the attention implementation was changed after patch_model")
        return notes


def _merged_graphs(reports: Sequence[GraphReport]) -> GraphReport:
    return GraphReport(
        captures=sum(report.captures for report in reports),
        capture_s=sum(report.capture_s for report in reports),
        replays=sum(report.replays for report in reports),
        eager=_sum(report.eager for report in reports),
    )


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
                "uncounted": any(layer.uncounted for layer in layers),
            }
        )
        for layers in zip(*(report.layers for report in reports), strict=True)
    ]
    return first.model_copy(
        update={
            "layers": layers,
            "graphs": _merged_graphs([report.graphs for report in reports]),
            "hook_active": all(report.hook_active for report in reports),
        }
    )


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


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
