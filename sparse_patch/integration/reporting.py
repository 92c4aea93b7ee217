"""What a patched model reports: its counts, and the plans of its calls."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import transformers
from torch import nn

from sparse_patch.call import PHASES, Phase
from sparse_patch.integration.layer_state import LayerState
from sparse_patch.integration.names import is_hook
from sparse_patch.integration.patch import PATCHING, Patch, config_of, patch_of, states_on, transformers_model
from sparse_patch.integration.transformers_internals import implementation_of
from sparse_patch.plans import Plan
from sparse_patch.report import (
    COUNTING,
    GraphCounts,
    GraphReport,
    LayerCounts,
    LayerReport,
    PhaseReport,
    SparsityReport,
)
from sparse_patch.version import __version__


def sparsity_report(model: nn.Module) -> SparsityReport:
    """What the model computed since it was patched, or since `reset_report`, layer by layer and head by head.

    Raises:
        PatchError: the model is not patched.
    """
    with PATCHING:
        patch, states = patch_of(transformers_model(model)), states_on(model)
        _settle(patch, states)
        active = all(is_hook(implementation_of(config_of(module))) for module in patch.attention)
    with COUNTING:
        layers = [_layer_report(state) for state in states]
    return SparsityReport(
        config=patch.config.settings(),
        source=patch.config.source,
        fingerprint=patch.config.fingerprint(),
        hook_active=active,
        versions=versions(),
        layers=layers,
        graphs=GraphReport.of(patch.graphs),
        remarks=_remarks(states),
    )


def _settle(patch: Patch, states: Sequence[LayerState]) -> None:
    """Move what graphs counted into the counts of the layers."""
    patch.mark.settle()
    with COUNTING:
        for state in states:
            state.settle()


def _remarks(states: Sequence[LayerState]) -> list[str]:
    """The remarks of the methods of all layers, each once, and which heads are counted."""
    methods = dict.fromkeys(method for state in states for method in state.methods.values())
    remarks = list(dict.fromkeys(remark for method in methods if (remark := method.remark())))
    state = states[0]
    if state.shard.size > 1:
        remarks.append(f"tensor parallelism: only the heads of rank {state.shard.rank} of {state.shard.size}")
    return remarks


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {
        "sparse_patch": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def reset_report(model: nn.Module) -> None:
    """Start the counts of `sparsity_report` again from zero.

    Raises:
        PatchError: the model is not patched.
    """
    states, patch = states_on(model), patch_of(transformers_model(model))
    _settle(patch, states)
    patch.graphs = GraphCounts()
    for state in states:
        state.counts = LayerCounts()


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """Leave what runs in a `with` block out of `sparsity_report`, such as warm-ups and trials of batch sizes.

    Raises:
        PatchError: the model is not patched.
    """
    states, patch = states_on(model), patch_of(transformers_model(model))
    counts, graphs = [state.counts for state in states], patch.graphs
    reset_report(model)
    try:
        yield
    finally:
        _settle(patch, states)
        patch.graphs = graphs
        for state, count in zip(states, counts, strict=True):
            state.counts = count


@contextmanager
def capture_plans(model: nn.Module) -> Iterator[dict[int, list[tuple[Phase, Plan]]]]:
    """Keep the plans of the calls that run in a `with` block, by layer, oldest first; for pictures and tests.

    Raises:
        PatchError: the model is not patched.
    """
    states = states_on(model)
    captured: dict[int, list[tuple[Phase, Plan]]] = {}
    for state in states:
        state.captured = captured.setdefault(state.layer, [])
    try:
        yield captured
    finally:
        for state in states:
            state.captured = None


def _layer_report(state: LayerState) -> LayerReport:
    prefill, decode = (state.config.method(phase) if phase in state.methods else None for phase in PHASES)
    return LayerReport(
        layer=state.layer,
        name=state.name,
        prefill_method=prefill.method if prefill else None,
        decode_method=decode.method if decode else None,
        prefill=PhaseReport.of(state.counts.prefill),
        decode=PhaseReport.of(state.counts.decode),
        compiled=state.counts.compiled,
        uncounted=state.counts.uncounted,
    )
