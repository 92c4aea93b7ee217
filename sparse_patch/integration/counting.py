"""What the hook tells the report: every call, and the plan that it ran or why it was dense."""

import warnings

import torch

from sparse_patch.call import AttentionCall, Phase
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.integration.caches.lookup import copies
from sparse_patch.integration.layer_state import LayerState
from sparse_patch.integration.masks import LazyMask
from sparse_patch.integration.request import Request
from sparse_patch.integration.step import StepCall
from sparse_patch.plans import Dense, Plan, SparsePlan
from sparse_patch.report import COUNTING, PhaseCompiledCounts, Work


def count_sparse(
    state: LayerState, call: AttentionCall, plan: SparsePlan, mask: LazyMask, keeps_all: bool = True
) -> None:
    """Record a call that ran a sparse plan.

    `keeps_all` says whether the cache has every key, or only those that the plan's queries read.
    """
    if mask.captured is not None:
        mask.captured.append(StepCall(state, call.phase, call, plan, None, keeps_all))
        return
    keeping = plan.known_beforehand and call.phase == "decode" and keeps_all
    copying = not plan.known_beforehand and copies(mask.forward.cache, state.cache_layer)
    if torch.compiler.is_compiling():
        if (in_graph := _counts_in_graph(state, call.phase, call.q)) is not None:
            in_graph.add_sparse(mask.work, plan, copying, keeping)
        return
    decided, work, by_head = plan.decided_pairs, mask.work, plan.pairs_by_head
    with COUNTING:
        counts = state.counts.of(call.phase)
        counts.add_sparse(work, by_head, decided)
        counts.keeping_calls += keeping
        counts.copying_calls += copying
        state.serve_graphs(call.q)
        _capture(state, call.phase, plan)


def count_dense(
    request: Request, phase: Phase, dense: Dense | None, unserved: Dense | None, call: AttentionCall | None
) -> None:
    """Record a dense call: `dense` by design or by the method's choice of `call`, or else `unserved`.

    Inside a graph nobody is warned.

    Raises:
        UnsupportedCallError: the call is `unserved`, and the configuration says `on_unsupported: error`.
    """
    state, mask, reason = request.state, request.mask, dense or unserved
    assert reason is not None
    if dense is None:
        _complain(state, phase, reason.reason)
    if isinstance(mask, LazyMask) and mask.captured is not None:
        mask.captured.append(StepCall(state, phase, call, None, reason.reason, window=mask.window))
        return
    work = mask.work if isinstance(mask, LazyMask) else _full_work(request.query, request.key)
    if torch.compiler.is_compiling():
        if (in_graph := _counts_in_graph(state, phase, request.query)) is not None:
            in_graph.add_dense(work, reason.reason, is_fallback=dense is None)
        elif dense is None:
            state.counts.of(phase).uncounted_fallback = reason.reason
        return
    with COUNTING:
        counts = state.counts.of(phase)
        (counts.fallbacks if dense is None else counts.dense)[reason.reason] += 1
        counts.add_dense(work)
        state.serve_graphs(request.query)
        _capture(state, phase, reason)


def count_dense_kernel(request: Request, phase: Phase, kernel: str) -> None:
    """Record which kernel ran a dense call instead of the model's own."""
    if torch.compiler.is_compiling():
        if (in_graph := _counts_in_graph(request.state, phase, request.query)) is not None:
            in_graph.add_kernel(kernel)
    elif request.mask.captured is None:
        with COUNTING:
            request.state.counts.of(phase).dense_kernels[kernel] += 1


def _counts_in_graph(state: LayerState, phase: Phase, query: torch.Tensor) -> PhaseCompiledCounts | None:
    """What a graph adds a call to: a graph would be compiled anew for every value of a Python counter.

    None if the layer has no counts on this device, and in `torch.export`, whose graph leaves the model; the report says
    so.
    """
    in_graphs = state.in_graphs
    state.counts.compiled = True
    if in_graphs is None or not in_graphs.serves(query) or _is_exporting():
        state.counts.uncounted = True
        return None
    return in_graphs.of(phase)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_exporting() -> bool:
    """Whether `torch.export` traces. torch.compile (2.11) takes PyTorch's own function for always true."""
    return torch.compiler.is_exporting()


def _full_work(query: torch.Tensor, key: torch.Tensor) -> Work:
    """The work of a call with an unknown mask: the causal triangle."""
    batch, _, queries, _ = query.shape
    before = key.shape[2] - queries
    causal = batch * (queries * before + queries * (queries + 1) // 2)
    return Work(batch * queries, causal, causal)


def _capture(state: LayerState, phase: Phase, plan: Plan) -> None:
    if state.captured is not None:
        state.captured.append((phase, plan))


def _complain(state: LayerState, phase: Phase, reason: str) -> None:
    """Do what `on_unsupported` says."""
    if state.config.on_unsupported == "error":
        raise UnsupportedCallError(
            f"{state.name}: {phase}: {reason}: not supported by {state.config.source}; on_unsupported: warn goes dense"
        )
    warns = state.config.on_unsupported == "warn" and not torch.compiler.is_compiling()
    if warns and reason not in state.warned:
        state.warned.add(reason)
        warnings.warn(f"sparse_patch: {phase} falls back to dense attention: {reason}", stacklevel=2)
