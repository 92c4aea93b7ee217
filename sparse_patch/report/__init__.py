"""What was actually computed: the counters that the hook fills, and the typed report made from them."""

from sparse_patch.report.compiled import CompiledCounts, PhaseCompiledCounts
from sparse_patch.report.counts import COUNTING, GraphCounts, LayerCounts, PhaseCounts, Work
from sparse_patch.report.reports import GraphReport, LayerReport, PhaseReport, SparsityReport, merged

__all__ = [
    "COUNTING",
    "CompiledCounts",
    "GraphCounts",
    "GraphReport",
    "LayerCounts",
    "LayerReport",
    "PhaseCompiledCounts",
    "PhaseCounts",
    "PhaseReport",
    "SparsityReport",
    "Work",
    "merged",
]
