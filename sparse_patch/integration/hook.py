"""The hook: the attention function that Transformers calls on a patched model.

The hook turns module, tensors and mask into an `AttentionCall`, asks the layer's method for a plan and has an op
execute the plan. A call that no sparse path can serve is counted with its reason and goes to the implementation that
the model had before, with exactly the mask that this implementation would have got.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from sparse_patch.call import PHASES, AttentionCall, KVState, Phase, Slot
from sparse_patch.errors import PatchError, UnsupportedCallError
from sparse_patch.integration.caches.lookup import keep_all, kv_state_of, max_length_of, ring_of
from sparse_patch.integration.caches.rings import RingLayer
from sparse_patch.integration.counting import count_dense, count_dense_kernel, count_sparse
from sparse_patch.integration.fallbacks import dense_by_design, untraceable, why_unsupported
from sparse_patch.integration.layer_state import LayerState
from sparse_patch.integration.masks import DECODE_MAX_QUERIES, LazyMask, lazy_mask, lazy_mask_for_kernels
from sparse_patch.integration.names import HOOK, ON_KERNELS, hook_name
from sparse_patch.integration.request import Request
from sparse_patch.integration.step import NotAStep
from sparse_patch.integration.unpatched import attend_densely, attend_unpatched
from sparse_patch.kernels.autocast import as_autocast
from sparse_patch.kernels.inference_mode import ordinary_tensors
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.ops.attention import dense as dense_kernels
from sparse_patch.ops.attention import page_decode, span_ring, table
from sparse_patch.ops.attention.op import Attended
from sparse_patch.plans import Dense, PagePlan, SpanPlan, SparsePlan
from sparse_patch.tensor_parallel import HeadShard

T = TypeVar("T")
_SPANS: Slot[SpanPlan] = Slot("plan of rings")


def register(unpatched: str | None) -> None:
    """Register the hook with Transformers, for models that had a given implementation. Calling again has no effect."""
    for kind, mask_function in {HOOK: lazy_mask, ON_KERNELS: lazy_mask_for_kernels}.items():
        AttentionInterface.register(hook_name(unpatched, kind), sparse_attention)
        AttentionMaskInterface.register(hook_name(unpatched, kind), mask_function)


def join_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    """Before the forward of an attention module: tell the mask which cache is used. The hook itself gets only the mask.

    The arguments have other names in some models (`layer_past`, ...), so they are recognised by their type. While
    another thread patches or unpatches the model, PyTorch may call this without `kwargs`, or after the state is gone.
    Attention is then not patched.
    """
    state: LayerState | None = getattr(module, "sparse_patch", None)
    if state is None or kwargs is None:
        return
    cache = mask = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, LazyMask):
            mask = value
        elif isinstance(value, Cache):
            cache = value
    if mask is not None:
        mask.forward.join(state.patch)
        mask.forward.use(cache)
    if cache is not None:
        _announce(cache, state.cache_layer, mask)


def _announce(cache: Cache, layer: int, mask: LazyMask | None) -> None:
    """Tell a layer of a cache that a forward is coming. Without a lazy mask the hook cannot know the cache."""
    ring = ring_of(cache, layer)
    if ring is not None:
        if ring.is_left_behind or (ring.is_empty and mask is None):
            keep_all(cache, layer)
        else:
            ring.expect()
    elif mask is None and (kv_state := kv_state_of(cache, layer)) is not None:
        kv_state.clear()


def sparse_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that is registered with Transformers (see its AttentionInterface).

    Args:
        module: the attention module. A module without a patch is dense; its model was made from a patched one's config.
        query: `[B, Hq, Sq, D]`.
        key: `[B, Hkv, Skv, D]`, everything the cache returns.
        value: `[B, Hkv, Skv, Dv]`.
        attention_mask: a `LazyMask`, or what the caller passed instead.
        scaling: factor on the logits; None for `D ** -0.5`.

    Returns:
        The output `[B, Sq, Hq, Dv]`, and the attention weights if the model's previous implementation gives them.

    Raises:
        PatchError: the cache is a paged one, which bypasses the mask; or the model was patched again or unpatched while
            the forward ran.
        UnsupportedCallError: the method cannot serve the call, and the configuration says `on_unsupported: error`; or a
            ring has forgotten keys that a dense call needs.
    """
    if kwargs.get("cache") is not None:
        raise PatchError("continuous batching does not work on a patched model; use generate, or unpatch_model first")
    state: LayerState | None = getattr(module, "sparse_patch", None)
    if state is None:
        return attend_unpatched(module, (query, key, value), attention_mask, scaling=scaling, **kwargs)
    request = Request(state, module, query, key, value, attention_mask, scaling, kwargs)
    if not query.is_cuda or torch.compiler.is_compiling():
        return _dispatch(request)
    with torch.cuda.device(query.get_device()):  # Triton launches on the current device; a model may be on several
        return _dispatch(request)


def _dispatch(request: Request) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run `sparse_attention` with the device of its tensors as the current one."""
    state, mask = request.state, request.mask
    if not isinstance(mask, LazyMask):
        return _attend(request)
    mask.forward.join(state.patch)  # again: the model may have been patched since the module was called
    ring = ring_of(mask.forward.cache, state.cache_layer)
    if ring is not None and not ring.is_empty:
        return _in_one_precision(request, partial(_attend_to_ring, ring)), None
    if ring is not None:
        request = replace(request, mask=mask.alone)
        attended = _attend(request)
        _fill(request, ring)
        return attended
    if state.cache_layer in mask.forward.gave_way:  # the layer attends twice; the keys are still only the forward's own
        request = replace(request, mask=mask.alone)
    queries = request.mask.queries_of_prompt
    if queries is not None and _decides_in_some_phase(request):
        return _attend_in_parts(request, queries)
    return _attend(request)


def _fill(request: Request, ring: RingLayer) -> None:
    """After the first forward: begin the ring, or keep every token if a ring could not serve later forwards."""
    serves = torch.compiler.is_compiling() or ring.hands_over(request.key, request.value)  # a graph has no identities
    if not (serves and _in_one_precision(request, partial(_begin, ring))):
        keep_all(request.mask.forward.cache, request.state.cache_layer)
        request.mask.forward.gave_way.add(request.state.cache_layer)


def _begin(ring: RingLayer, request: Request) -> bool:
    """Write the first tokens of a ring; False if it cannot serve such calls."""
    if why_unsupported(request) is not None:
        return False
    ring.write(request.key, request.value, request.mask.tokens_before, request.state.config.backend)
    return True


def _attend_in_parts(request: Request, queries: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend in a forward that has the last `queries` tokens of a prompt and then candidates to verify.

    The prompt gives the same output as without candidates, and the candidates are decoded.
    """
    query, key, value = request.tensors
    mask, of_candidates = request.mask.parted(queries)
    key, value = key[:, :, : mask.kv_length], value[:, :, : mask.kv_length]
    prompt, _ = _attend(replace(request, query=query[:, :, :queries], key=key, value=value, mask=mask))
    candidates, _ = _attend(replace(request, query=query[:, :, queries:], mask=of_candidates))
    return torch.cat([prompt, candidates], dim=1), None


def _decides_in_some_phase(request: Request) -> bool:
    """Whether a method of the configuration decides about calls of this layer, in some phase."""
    return not request.wants_weights and any(dense_by_design(request, phase) is None for phase in PHASES)


def _attend(request: Request) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`sparse_attention` if all keys are available.

    Raises:
        NotAStep: the call needs the unpatched implementation, and the forward is a step.
    """
    output = _in_one_precision(request, _attend_by_plan)
    if output is not None:
        return output, None
    if request.is_step:
        raise NotAStep("attention of the model's own implementation")
    return attend_densely(request)


def _in_one_precision(request: Request, attend: Callable[[Request], T]) -> T:
    """The result of `attend`. With autocast, the tensors are cast once before, and nothing is cast after that."""
    device = request.query.device.type
    if not torch.is_autocast_enabled(device):
        return attend(request)
    cast = request.having(as_autocast(*request.tensors))
    with torch.autocast(device, enabled=False):
        return attend(cast)


def _attend_by_plan(request: Request) -> torch.Tensor | None:
    """The output of a call by its plan, `[B, Sq, Hq, Dv]`; None if the unpatched implementation should attend."""
    state, mask, phase = request.state, request.mask, _phase(request)
    kv_state = kv_state_of(mask.forward.cache, state.cache_layer) if isinstance(mask, LazyMask) else None
    dense, unserved = dense_by_design(request, phase), None
    if dense is None and _corrects(kv_state):
        dense = Dense("cache correction")
    call, may_be_best = None, _may_be_best(request, kv_state)
    if dense is None or state.keeps_state or may_be_best:
        unserved = why_unsupported(request) or untraceable(request, phase)
        _check_step(request, unserved)
        if unserved is None:
            call = _attention_call(request, phase, kv_state)
    _remember(state, call, kv_state)
    asked = call if dense is None else None
    if dense is None and call is not None:
        plan = state.methods[phase].plan(call)
        if isinstance(plan, Dense):
            dense = plan
        else:
            reason = table.why_unsupported(call, plan, state.config.backend)
            if reason is None:
                return _attend_sparsely(request, call, plan)
            unserved = Dense(reason)
            _check_step(request, unserved)
    count_dense(request, phase, dense, unserved, asked)
    if dense is not None and call is not None and may_be_best:
        return _attend_at_best(request, call)
    return None


def _check_step(request: Request, unserved: Dense | None) -> None:
    """Raise NotAStep if a call of a step is not served: only the forward as a whole can run otherwise."""
    if unserved is not None and request.is_step:
        raise NotAStep(unserved.reason)


def _attend_to_ring(ring: RingLayer, request: Request) -> torch.Tensor:
    """The output `[B, Sq, Hq, Dv]` of a later forward on a ring: the next chunk of a prompt, or a token.

    The ring decides what is read, whatever the method of the phase, because there are no other keys.
    """
    state, mask, phase, backend = request.state, request.mask, _phase(request), request.state.config.backend
    unserved = why_unsupported(request, ring)
    _check_step(request, unserved)
    if unserved is not None:
        raise _refusal(state, ring, phase, unserved.reason)
    dtype = request.query.dtype
    held = ring.holding(dtype)  # differs if autocast was switched on or off since the ring was filled
    if held != dtype:
        request = request.having(tensor.to(held) for tensor in request.tensors)
    call = _attention_call(request, phase, kv_state=None)
    if reason := span_ring.why_unsupported(call, backend):
        raise _refusal(state, ring, phase, reason)
    attended = ring.attend(call, mask.tokens_before, backend, mask.known_before, return_lse=request.sinks is not None)
    attended = _with_sinks(request, attended)
    count_sparse(state, call, _ring_plan(ring, call, mask), mask, keeps_all=False)
    return attended.out.transpose(1, 2).contiguous().to(dtype)


def _refusal(state: LayerState, ring: RingLayer, phase: Phase, reason: str) -> UnsupportedCallError:
    """The error to raise instead of dense attention. The ring is put back to its state before the forward."""
    ring.take_back()
    return UnsupportedCallError(
        f"{state.name}: {phase}: {reason}: not served by a span cache, which has forgotten keys that dense attention "
        "needs; pass past_key_values=growing_cache(model.config)"
    )


def _ring_plan(ring: RingLayer, call: AttentionCall, mask: LazyMask) -> SpanPlan:
    """What a forward reads of all tokens ever seen. Layers with the same spans share the plan and its counts."""
    assert ring.layout is not None
    sinks, windows = ring.layout.sinks, ring.layout.windows
    _, heads, q_length, _ = call.q.shape
    state, key = call.forward_state, (heads, sinks, windows, call.q.device)
    plan = _SPANS.get(state, key)
    if plan is None:
        of_rows = mask.tokens_before + q_length, call.row_starts()
        plan = SpanPlan(sinks, windows, heads, q_length, mask.kv_length, *of_rows)
        _SPANS.put(state, plan, key)
    return plan


def _phase(request: Request) -> Phase:
    mask = request.mask
    is_decode = mask.is_decode if isinstance(mask, LazyMask) else request.query.shape[2] <= DECODE_MAX_QUERIES
    return "decode" if is_decode else "prefill"


def _attention_call(request: Request, phase: Phase, kv_state: KVState | None) -> AttentionCall:
    state, mask, query = request.state, request.mask, request.query
    key, value, q_start, end, known_end = request.key, request.value, 0, None, None
    if phase == "decode":
        end = mask.end_on_device
        known_end = None if mask.reach is None else mask.reach.length
    if end is None:
        q_start, valid = mask.q_start, mask.q_start + mask.q_length
        if valid != key.shape[2]:  # the tail of a static cache is not valid
            key, value = key[:, :, :valid], value[:, :, :valid]
    return AttentionCall(
        q=query,
        k=key,
        v=value,
        scale=query.shape[-1] ** -0.5 if request.scaling is None else request.scaling,
        layer=state.layer,
        phase=phase,
        q_start=q_start,
        kv_start=mask.real_row_starts,
        softcap=request.kwargs.get("softcap"),
        kv_end=end,
        known_end=known_end,
        forward_state=mask.forward.forward_state,
        kv_state=kv_state,
        max_length=max_length_of(mask.forward.cache, state.cache_layer),
        split=_split(state, query.shape[1]),
    )


def _split(state: LayerState, heads: int) -> HeadShard | None:
    """The part of the layer's heads that this process has; None if the heads are not split."""
    if state.shard.size == 1:
        return None
    return state.shard.of_layer(heads, state.original_config.num_attention_heads)


def _remember(state: LayerState, call: AttentionCall | None, kv_state: KVState | None) -> None:
    """Keep the decode method's state in step with the keys. If the method cannot see the keys, it must start again."""
    if not state.keeps_state or kv_state is None:
        return
    if call is None:
        kv_state.clear()
    elif state.decoder is not None:
        with ordinary_tensors():
            state.decoder.remember(call)


def decode_step(call: AttentionCall, plan: SparsePlan, method: BoundMethod | None, backend: str) -> Attended:
    """Attend by a plan. If the decode method asked for logits, let it select by them."""
    attended = table.attend(call, plan, backend)
    _select(call, attended, method)
    return attended


def _select(call: AttentionCall, attended: Attended, method: BoundMethod | None) -> None:
    if attended.logits is not None:
        assert method is not None and attended.lse is not None, "only a plan of a decode method wants logits"
        method.select(call, attended.logits, attended.lse[..., -1])


def _with_sinks(request: Request, attended: Attended) -> Attended:
    return attended if request.sinks is None else attended.with_sinks(request.sinks)


def _attend_sparsely(request: Request, call: AttentionCall, plan: SparsePlan) -> torch.Tensor:
    """Attend by a plan and count the call; return the output `[B, Sq, Hq, Dv]`."""
    state = request.state
    attended = table.attend(call, plan, state.config.backend, return_lse=request.sinks is not None)
    attended = _with_sinks(request, attended)
    _select(call, attended, state.decoder)
    count_sparse(state, call, plan, request.mask)
    return attended.out.transpose(1, 2).contiguous()


def _corrects(kv_state: KVState | None) -> bool:
    """Whether the forward is a correction of the cache, see `integration.kv_correction`."""
    return kv_state is not None and kv_state.at_rest


def _may_be_best(request: Request, kv_state: KVState | None) -> bool:
    """Whether a call that is dense anyway may run on another kernel than the model's own. In a step it has to.

    In a correction it should: on Hopper PyTorch leaves few queries to cuDNN, whose attention gives other last bits now
    and then on the same tensors, and prepares itself anew for every number of keys.
    """
    is_asked = request.state.config.dense == "best" or _corrects(kv_state)
    return request.is_step or (is_asked and not request.has_window)


def _attend_at_best(request: Request, call: AttentionCall) -> torch.Tensor | None:
    """The output `[B, Sq, Hq, Dv]` of the fastest dense kernel; None if no kernel serves that beats the model's own."""
    kernel, attended = None, None
    if call.phase == "decode" or _corrects(call.kv_state):
        plan = PagePlan.every(call)
        backend = page_decode.fastest(call, plan)
        if backend == "triton" or request.is_step or (request.sinks is None and page_decode.is_one_kernel(call)):
            kernel, attended = "page_decode", page_decode.attend(call, plan, backend, request.sinks is not None)
    elif request.sinks is None:  # the dense kernels give no LSE
        kernel = dense_kernels.fastest(call)
        attended = dense_kernels.attend(call, kernel) if kernel else None
    if kernel is None or attended is None:
        return None
    count_dense_kernel(request, call.phase, kernel)
    return _with_sinks(request, attended).out.transpose(1, 2).contiguous()
