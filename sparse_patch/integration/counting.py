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
from sparse_patch.report import COUNTING, Work


def count_sparse(
    state: LayerState, call: AttentionCall, plan: SparsePlan | None, mask: LazyMask, keeps_all: bool = True
) -> None:
    """Record a call that ran a sparse plan. Inside a graph the plan is not read.

    `keeps_all` says whether the cache has every key, or only those that the plan's queries read.
    """
    if torch.compiler.is_compiling():  # a graph would be compiled anew for every value of a Python counter
        state.counts.compiled = True
        return
    assert plan is not None
    if mask.captured is not None:
        mask.captured.append(StepCall(state, call.phase, call, plan, None, keeps_all))
        return
    decided, work, by_head = plan.decided_pairs, mask.work, plan.pairs_by_head
    with COUNTING:
        counts = state.counts.of(call.phase)
        counts.add_sparse(work, by_head, decided)
        if plan.known_beforehand:
            counts.keeping_calls += call.phase == "decode" and keeps_all
        else:
            counts.copying_calls += copies(mask.forward.cache, state.cache_layer)
        _capture(state, call.phase, plan)


def count_dense(
    request: Request, phase: Phase, dense: Dense | None, unserved: Dense | None, call: AttentionCall | None
) -> None:
    """Record a dense call: `dense` by design or by the method's choice of `call`, or else `unserved`.

    Inside a graph nothing is counted and nobody is warned; the graph notes the reason whenever it runs.

    Raises:
        UnsupportedCallError: the call is `unserved`, and the configuration says `on_unsupported: error`.
    """
    state, mask, reason = request.state, request.mask, dense or unserved
    assert reason is not None
    if dense is None:
        _complain(state, phase, reason.reason)
    if torch.compiler.is_compiling():
        state.counts.compiled = True
        if dense is None:
            state.counts.of(phase).fallback_in_graph = reason.reason
        return
    if isinstance(mask, LazyMask) and mask.captured is not None:
        mask.captured.append(StepCall(state, phase, call, None, reason.reason, window=mask.window))
        return
    work = mask.work if isinstance(mask, LazyMask) else _full_work(request.query, request.key)
    with COUNTING:
        counts = state.counts.of(phase)
        (counts.fallbacks if dense is None else counts.dense)[reason.reason] += 1
        counts.add_dense(work)
        _capture(state, phase, reason)


def count_dense_kernel(request: Request, phase: Phase, kernel: str) -> None:
    """Record which kernel ran a dense call instead of the model's own."""
    if not torch.compiler.is_compiling() and request.mask.captured is None:
        with COUNTING:
            request.state.counts.of(phase).dense_kernels[kernel] += 1


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
