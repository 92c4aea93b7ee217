"""What two sparsity reports are compared by."""

from sparse_patch.report import LayerReport, SparsityReport


def counted_in_graphs(report: SparsityReport) -> list[LayerReport]:
    """The layers of a model whose calls all ran, and were counted, inside graphs or outside: as if outside."""
    assert not any(layer.uncounted for layer in report.layers) and "not counted" not in str(report)
    return [layer.model_copy(update={"compiled": False}) for layer in report.layers]
