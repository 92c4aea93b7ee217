"""The hook: the attention function that Transformers calls on a patched model.

It turns module, tensors and mask into an `AttentionCall`, asks the layer's method for a plan and has an op execute it.
Whatever a sparse path cannot serve goes, counted with its reason, to the implementation that the model had before, with
the very mask that this implementation would have got.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from sparse_patch.caches import (
    RingLayer,
    copies,
    keep_all,
    max_length_of,
    memory_of,
    ordinary_tensors,
    ring_of,
)
from sparse_patch.call import PHASES, AttentionCall, Phase
from sparse_patch.config import PatchConfig
from sparse_patch.discovery import dispatch_scope
from sparse_patch.errors import PatchError, UnsupportedCallError
from sparse_patch.forward import PatchMark
from sparse_patch.head_shard import HeadShard
from sparse_patch.masks import DECODE_MAX_QUERIES, LazyMask, lazy_mask, lazy_mask_for_kernels
from sparse_patch.memory import LayerMemory
from sparse_patch.methods.base import DecodeMethod, Method
from sparse_patch.names import HOOK, ON_KERNELS, hook_name, is_hook, unpatched_name
from sparse_patch.ops import block_sparse, page_decode, span, span_ring, token_blocks
from sparse_patch.ops import dense as dense_kernels
from sparse_patch.plans import BlockPlan, Dense, PagePlan, Plan, SpanPlan, SparsePlan, TokenBlockPlan
from sparse_patch.precision import as_autocast, without_autocast
from sparse_patch.report import COUNTING, LayerCounts, Work

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Tensors among the keyword arguments that leave the arithmetic of attention as it is. Any other one makes a call dense.
_HARMLESS_TENSORS = frozenset({"position_ids", "cache_position", "text_position_ids", "labels", "input_ids"})

AttentionFunction = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclass
class LayerState:
    """What a patched attention module carries, as its attribute `sparse_patch`.

    It is the same for all forwards; what belongs to one travels with that forward's mask and cache. The counts are the
    only thing that a forward changes.

    Attributes:
        name: dotted path of the module in its model.
        layer: index of the layer.
        cache_layer: index of the layer whose keys it reads: its own, but where layers share keys.
        kind: its attention in the model itself, "full", "sliding", ...
        config: the configuration; shared by all layers.
        patch: tells this patch of the model from others; shared by all layers.
        phases: phases in which this layer uses the configured method; it is dense in the others.
        original_config: the Transformers config that the module has without the patch.
        dense: the attention function of the implementation that the model had before.
        warned: reasons that were warned about; shared by all layers.
        shard: the heads that this process has, where tensor parallelism splits them; shared by all layers.
        counts: what was computed, for the report.
        captured: when not None, the plans of the calls that ran, newest last.
    """

    name: str
    layer: int
    cache_layer: int
    kind: str
    config: PatchConfig
    patch: PatchMark
    phases: frozenset[Phase]
    original_config: Any
    dense: AttentionFunction
    warned: set[str]
    shard: HeadShard
    counts: LayerCounts = field(default_factory=LayerCounts)
    captured: list[tuple[Phase, Plan]] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A patched model was loaded whole, maybe where nothing was patched yet."""
        vars(self).update(state)
        register(self.original_config._attn_implementation)

    @property
    def remembers(self) -> bool:
        """Whether the decode method keeps something beside the keys."""
        return self.decoder is not None and type(self.decoder).remember is not DecodeMethod.remember

    @property
    def decoder(self) -> DecodeMethod | None:
        """The sparse decode method of this layer."""
        method = self.config.decode if "decode" in self.phases else None
        return method if isinstance(method, DecodeMethod) else None


class _Unpatched:
    """The module as its own attention function knows it: with the config it had before, everything else its own."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def register(unpatched: str | None) -> None:
    """Register the hook with Transformers, for models that had an implementation; doing it again changes nothing."""
    for kind, mask_function in {HOOK: lazy_mask, ON_KERNELS: lazy_mask_for_kernels}.items():
        AttentionInterface.register(hook_name(unpatched, kind), sparse_attention)
        AttentionMaskInterface.register(hook_name(unpatched, kind), mask_function)


def join_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the forward of an attention module: tell the mask which cache is used. The hook is told the mask only.

    The arguments have other names in some models (`layer_past`, ...), so they are known by what they are.
    """
    state: LayerState = module.sparse_patch  # type: ignore[assignment]
    cache = mask = None
    for value in (*args, *kwargs.values()):
        if isinstance(value, LazyMask):
            mask = value
        elif isinstance(value, Cache):
            cache = value
    if mask is not None:
        mask.forward.join(cache, state.patch)
    if cache is not None:
        _announce(cache, state.cache_layer, mask)


def _announce(cache: Cache, layer: int, mask: LazyMask | None) -> None:
    """Tell a layer of a cache that a forward is coming; without a lazy mask nobody will know of it in the hook."""
    ring = ring_of(cache, layer)
    if ring is not None:
        if ring.is_left_behind or (ring.is_empty and mask is None):
            keep_all(cache, layer)
        else:
            ring.expect()
    elif mask is None and (memory := memory_of(cache, layer)) is not None:
        memory.clear()


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
        module: the attention module. One without a patch, of a model made from a patched one's config, is dense.
        query: `[B, Hq, Sq, D]`.
        key: `[B, Hkv, Skv, D]`, everything the cache returns.
        value: `[B, Hkv, Skv, Dv]`.
        attention_mask: a `LazyMask`, or what the caller passed in its place.
        scaling: factor on the logits; None for `D ** -0.5`.

    Returns:
        The output `[B, Sq, Hq, Dv]`, and the attention weights where the implementation that the model had gives them.

    Raises:
        PatchError: the cache is a paged one, which goes around the mask, or the model was patched anew or unpatched
            while the forward ran.
        UnsupportedCallError: the method cannot serve the call, and the configuration says `on_unsupported: error`, or a
            ring has forgotten the keys that a dense call needs.
    """
    if kwargs.get("cache") is not None:
        raise PatchError("continuous batching does not work on a patched model; use generate, or unpatch_model first")
    state: LayerState | None = getattr(module, "sparse_patch", None)
    if state is None:
        return _attend_unpatched(module, (query, key, value), attention_mask, scaling=scaling, **kwargs)
    with _on_device_of(query):
        return _dispatch(state, module, (query, key, value), attention_mask, scaling, kwargs)


def _attend_unpatched(
    module: nn.Module, tensors: tuple[torch.Tensor, ...], mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a module computes that was made from a patched model's config and has no patch itself."""
    if isinstance(mask, LazyMask):
        mask.forward.check_patched()
    config = unpatched_config(module.config)  # type: ignore[arg-type]
    function = unpatched_function(module, config)
    if isinstance(mask, LazyMask):
        mask = mask.build(config._attn_implementation)
    return function(_Unpatched(module, config), *tensors, mask, **kwargs)


def unpatched_config(config: Any) -> Any:
    """A config as it is without the patch: itself, or a copy with the implementation that the hook's name says."""
    if not is_hook(config._attn_implementation):
        return config
    config, name = copy(config), unpatched_name(config._attn_implementation)
    config._attn_implementation_internal = name
    return config


def unpatched_function(module: nn.Module, config: Any) -> AttentionFunction:
    """The attention function of the implementation that a config of no patch names."""
    scope = dispatch_scope(module)
    assert scope is not None, "a module that reached the hook asks the attention interface"
    function: AttentionFunction = scope["ALL_ATTENTION_FUNCTIONS"].get_interface(
        config._attn_implementation, scope.get("eager_attention_forward")
    )
    return function


def _on_device_of(x: torch.Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, and a model may lie on several; compiled code sees to it itself."""
    return nullcontext() if not x.is_cuda or torch.compiler.is_compiling() else torch.cuda.device(x.device)


def _dispatch(
    state: LayerState,
    module: nn.Module,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    attention_mask: Any,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`sparse_attention`, once the device of its tensors is the current one."""
    lazy = attention_mask if isinstance(attention_mask, LazyMask) else None
    if lazy is None:
        return _attend(state, module, tensors, attention_mask, scaling, kwargs)
    ring = ring_of(lazy.forward.cache, state.cache_layer)
    if ring is None:
        queries = lazy.queries_of_prompt
        if queries is not None and _decides_in_some_phase(state, lazy, kwargs):
            return _attend_in_parts(state, module, tensors, lazy, scaling, kwargs, queries)
        return _attend(state, module, tensors, lazy, scaling, kwargs)
    if not ring.is_empty:
        return _attend_to_ring(state, ring, module, tensors, lazy, scaling, kwargs), None
    attended = _attend(state, module, tensors, lazy.alone, scaling, kwargs)
    _fill(state, ring, module, tensors, lazy.alone, kwargs)
    return attended


def _fill(
    state: LayerState,
    ring: RingLayer,
    module: nn.Module,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: LazyMask,
    kwargs: dict[str, Any],
) -> None:
    """After the first forward: begin the ring, or keep every token if a ring could not serve the forwards to come."""
    serves = ring.hands_over(*tensors[1:]) and _unservable(module, tensors, mask, kwargs) is None
    if torch.compiler.is_compiling() or serves:
        ring.write(*as_autocast(*tensors[1:]), mask.tokens_before, state.config.backend)
    else:
        keep_all(mask.forward.cache, state.cache_layer)


def _attend_in_parts(
    state: LayerState,
    module: nn.Module,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: LazyMask,
    scaling: float | None,
    kwargs: dict[str, Any],
    queries: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A forward that begins with the last `queries` tokens of a prompt and goes on with candidates to verify.

    The prompt comes out as it does without candidates, and those are decoded.
    """
    query, key, value = tensors
    of_prompt, of_candidates = mask.parted(queries)
    keys = of_prompt.kv_length
    first = query[:, :, :queries], key[:, :, :keys], value[:, :, :keys]
    others = query[:, :, queries:], key, value
    prompt, _ = _attend(state, module, first, of_prompt, scaling, kwargs)
    candidates, _ = _attend(state, module, others, of_candidates, scaling, kwargs)
    return torch.cat([prompt, candidates], dim=1), None


def _decides_in_some_phase(state: LayerState, mask: LazyMask, kwargs: dict[str, Any]) -> bool:
    """Whether a method of the configuration has a say in calls of this layer."""
    return not kwargs.get("output_attentions") and any(
        _dense_by_design(state, phase, mask, kwargs) is None for phase in PHASES
    )


def _attend(
    state: LayerState,
    module: nn.Module,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    attention_mask: Any,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`sparse_attention` where all keys are at hand."""
    with without_autocast(tensors[0].device):
        output = _attend_by_plan(state, module, as_autocast(*tensors), attention_mask, scaling, kwargs)
    if output is not None:
        return output, None
    return _attend_densely(state, module, tensors, attention_mask, scaling=scaling, **kwargs)


def _attend_by_plan(
    state: LayerState,
    module: nn.Module,
    tensors: tuple[torch.Tensor, ...],
    mask: Any,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor | None:
    """What the plan of a call gives, `[B, Sq, Hq, Dv]`; None for what the model did before it was patched."""
    phase: Phase = _phase(mask, tensors[0].shape[2])
    memory = memory_of(mask.forward.cache, state.cache_layer) if isinstance(mask, LazyMask) else None
    dense, unserved = _dense_by_design(state, phase, mask, kwargs), None
    if dense is None and memory is not None and memory.at_rest:
        dense = Dense("cache correction")
    call = None
    if dense is None or state.remembers or _may_be_best(state, mask, kwargs):
        unserved = _unsupported(module, tensors, mask, kwargs)
        if unserved is None:
            call = _attention_call(state, phase, tensors, mask, scaling, kwargs, memory)
    _remember(state, call, memory)
    if dense is None and call is not None:
        plan = _method(state, phase).plan(call)
        if isinstance(plan, Dense):
            dense = plan
        else:
            unserved = _why_unserved(call, plan, state.config.backend)
            if unserved is None:
                return _attend_sparsely(state, call, plan, mask)
    _count_dense(state, phase, tensors, mask, dense, unserved)
    if dense is not None and call is not None and _may_be_best(state, mask, kwargs):
        return _attend_at_best(state, call)
    return None


def _attend_to_ring(
    state: LayerState,
    ring: RingLayer,
    module: nn.Module,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: LazyMask,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """A forward after others on a ring, the next chunk of a prompt or a token: the output `[B, Sq, Hq, Dv]`.

    The ring says what is read, whatever the method of the phase: nothing else is there.
    """
    phase, backend = _phase(mask, tensors[0].shape[2]), state.config.backend
    with without_autocast(tensors[0].device):
        tensors = as_autocast(*tensors)  # type: ignore[assignment]
        unserved = _unsupported(module, tensors, mask, kwargs, ring)
        if unserved is not None:
            raise _refusal(state, ring, phase, unserved.reason)
        call = _attention_call(state, phase, tensors, mask, scaling, kwargs, memory=None)
        if reason := span_ring.unsupported(call, backend):
            raise _refusal(state, ring, phase, reason)
        output = ring.attend(call, mask.tokens_before, backend)
        if torch.compiler.is_compiling():
            state.counts.compiled = True
        else:
            _count_sparse(state, call, _ring_plan(ring, call, mask), mask)
    return output.transpose(1, 2).contiguous()


def _refusal(state: LayerState, ring: RingLayer, phase: Phase, reason: str) -> UnsupportedCallError:
    """What is raised in place of dense attention; the ring is as it was before the forward."""
    ring.take_back()
    return UnsupportedCallError(
        f"{state.name}: {phase}: {reason}: not served by a span cache, which has forgotten keys that dense attention "
        "needs; pass past_key_values=growing_cache(model.config)"
    )


def _ring_plan(ring: RingLayer, call: AttentionCall, mask: LazyMask) -> SpanPlan:
    """What a forward reads of all tokens ever seen. Layers of the same spans share it, and with it what is counted."""
    assert ring.layout is not None
    sinks, windows = ring.layout.sinks, ring.layout.windows
    key = f"spans of {call.q.shape[1]} heads: {sinks} {windows} on {call.q.device}"
    if key not in mask.forward.carried:
        _, heads, q_length, _ = call.q.shape
        of_rows = mask.tokens_before + q_length, call.row_starts()
        mask.forward.carried[key] = SpanPlan(sinks, windows, heads, q_length, mask.kv_length, *of_rows)
    plan: SpanPlan = mask.forward.carried[key]
    return plan


def _phase(mask: Any, q_length: int) -> Phase:
    is_decode = mask.is_decode if isinstance(mask, LazyMask) else q_length <= DECODE_MAX_QUERIES
    return "decode" if is_decode else "prefill"


def _dense_by_design(state: LayerState, phase: Phase, mask: Any, kwargs: dict[str, Any]) -> Dense | None:
    """Dense because the configuration or the model wants it so."""
    method = state.config.method(phase)
    if method is None:
        return Dense(f"no {phase} method")
    if phase not in state.phases:
        return Dense("layer not selected")
    if method.method == "dense":
        return Dense("method: dense")
    if _window(mask, kwargs):
        return Dense("chunked layer" if state.kind == "chunked" else "sliding-window layer")
    return None


def _window(mask: Any, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("sliding_window")) or (isinstance(mask, LazyMask) and mask.window is not None)


def _unsupported(
    module: nn.Module,
    tensors: tuple[torch.Tensor, ...],
    mask: Any,
    kwargs: dict[str, Any],
    ring: RingLayer | None = None,
) -> Dense | None:
    """Dense because no sparse path can serve the call; with a ring its keys are those of the forward alone."""
    if reason := _unservable(module, tensors, mask, kwargs, ring):
        return reason
    if torch.compiler.is_compiling() and not mask.is_decode:
        return Dense("prefill inside torch.compile")
    return None


def _unservable(
    module: nn.Module,
    tensors: tuple[torch.Tensor, ...],
    mask: Any,
    kwargs: dict[str, Any],
    ring: RingLayer | None = None,
) -> Dense | None:
    """`_unsupported` by what the call is, whoever runs it."""
    if not isinstance(mask, LazyMask):
        return Dense("no mask was built" if mask is None else "a mask tensor of the caller's or the model's making")
    if not mask.is_plain_causal:
        return Dense("mask is more than causal (packed sequences, prefix-LM or bidirectional blocks)")
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        return Dense("attention is not causal")
    if kwargs.get("output_attentions"):
        return Dense("output_attentions")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return Dense("gradients are needed (use torch.no_grad for inference)")
    if kwargs.get("dropout"):
        return Dense("attention dropout")
    if kwargs.get("s_aux") is not None or getattr(module, "sinks", None) is not None:
        return Dense("attention sinks in the softmax")
    for name, value in kwargs.items():
        if torch.is_tensor(value) and name not in _HARMLESS_TENSORS:
            return Dense(f"argument {name}")
    if reason := _unserved_dtypes(tensors, ring):
        return reason
    keys = mask.kv_length if ring is None else mask.q_length
    described = mask.kv_length if ring is None else ring.get_mask_sizes(mask.q_length)[0]
    if (tensors[1].shape[2], mask.kv_length) != (keys, described) or not mask.fits:
        return Dense("the cache returns other keys than the mask describes")
    if not mask.has_left_padding_only:
        return Dense("padding that is not on the left")
    return None


def _unserved_dtypes(tensors: tuple[torch.Tensor, ...], ring: RingLayer | None) -> Dense | None:
    dtypes = [tensor.dtype for tensor in tensors]
    if ring is not None and ring.keys is not None and ring.values is not None:
        dtypes += [ring.keys.dtype, ring.values.dtype]
    if dtypes[0] not in _DTYPES:
        return Dense(f"dtype {dtypes[0]}")
    if len(set(dtypes)) > 1:
        return Dense(f"queries, keys and values in several dtypes ({', '.join(map(str, dict.fromkeys(dtypes)))})")
    return None


def _attention_call(
    state: LayerState,
    phase: Phase,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: LazyMask,
    scaling: float | None,
    kwargs: dict[str, Any],
    memory: LayerMemory | None,
) -> AttentionCall:
    query, key, value = tensors
    cache = mask.forward.cache
    call = AttentionCall(
        q=query,
        k=key,
        v=value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        layer=state.layer,
        phase=phase,
        kv_start=mask.real_row_starts,
        softcap=kwargs.get("softcap"),
        carried=mask.forward.carried,
        memory=memory,
        max_length=max_length_of(cache, state.cache_layer),
        split=state.shard.of_layer(query.shape[1], state.original_config.num_attention_heads),
    )
    if phase == "decode" and mask.end_on_device is not None:
        return replace(call, kv_end=mask.end_on_device)
    valid = mask.q_start + mask.q_length  # the tail of a static cache is not valid
    return replace(call, k=key[:, :, :valid], v=value[:, :, :valid], q_start=mask.q_start)


def _remember(state: LayerState, call: AttentionCall | None, memory: LayerMemory | None) -> None:
    """Keep what the decode method keeps in step with the keys; where it cannot see them it must start again."""
    if not state.remembers or memory is None:
        return
    if call is None:
        memory.clear()
    elif state.decoder is not None:
        with ordinary_tensors():
            state.decoder.remember(call)


def _method(state: LayerState, phase: Phase) -> Method:
    method = state.config.method(phase)
    assert method is not None, "a phase without a method is dense by design"
    return method


def _why_unserved(call: AttentionCall, plan: SparsePlan, backend: str) -> Dense | None:
    """Dense because the backend cannot execute the plan."""
    if isinstance(plan, PagePlan):
        reason = page_decode.unsupported(call, plan, backend)
    elif isinstance(plan, SpanPlan):
        reason = span.unsupported(call, plan, backend)
    elif isinstance(plan, TokenBlockPlan):
        reason = token_blocks.unsupported(call, plan, backend)
    else:
        reason = block_sparse.unsupported(call, plan, backend)
    return None if reason is None else Dense(reason)


def attend_pages(call: AttentionCall, plan: PagePlan, method: DecodeMethod, backend: str) -> torch.Tensor:
    """Attend by a decode method's plan, and let the method select where it asked to: the output `[B, Hq, Sq, Dv]`."""
    output, lse, logits = page_decode.attend(call, plan, backend)
    if lse is not None and logits is not None:
        method.select(call, logits, lse[..., -1])
    return output


def _attend_sparsely(state: LayerState, call: AttentionCall, plan: SparsePlan, mask: LazyMask) -> torch.Tensor:
    """Attend and record: the output `[B, Sq, Hq, Dv]`."""
    if isinstance(plan, PagePlan):
        assert state.decoder is not None, "only a decode method plans pages"
        output = attend_pages(call, plan, state.decoder, state.config.backend)
    elif isinstance(plan, SpanPlan):
        output, _ = span.attend(call, plan, state.config.backend)
    elif isinstance(plan, TokenBlockPlan):
        output, _ = token_blocks.attend(call, plan, state.config.backend)
    else:
        output, _ = block_sparse.attend(call, plan, state.config.backend)
    _count_sparse(state, call, plan, mask)
    return output.transpose(1, 2).contiguous()


def _count_sparse(state: LayerState, call: AttentionCall, plan: SparsePlan, mask: LazyMask) -> None:
    """Record a call that ran a sparse plan."""
    if torch.compiler.is_compiling():  # a graph would be compiled anew for every value of a Python counter
        state.counts.compiled = True
        return
    decided = plan.decided_pairs if isinstance(plan, BlockPlan) else None
    work, by_head = mask.work, plan.pairs_by_head
    with COUNTING:
        counts = state.counts.of(call.phase)
        counts.add_sparse(work, by_head, decided)
        if isinstance(plan, SpanPlan):
            everything_kept = plan.capacity == call.kv_length  # not so where a ring keeps the others
            counts.keeping_calls += call.phase == "decode" and everything_kept
        else:
            counts.copying_calls += copies(mask.forward.cache, state.cache_layer)
        _capture(state, call.phase, plan)


def _count_dense(
    state: LayerState,
    phase: Phase,
    tensors: tuple[torch.Tensor, ...],
    mask: Any,
    dense: Dense | None,
    unserved: Dense | None,
) -> None:
    """Record a dense call: `dense` by design or by the method's choice, else one that was `unserved`."""
    reason = dense or unserved
    assert reason is not None
    if dense is None:
        _complain(state, phase, reason.reason)
    if torch.compiler.is_compiling():
        state.counts.compiled = True
        return
    work = mask.work if isinstance(mask, LazyMask) else _full_work(*tensors[:2])
    with COUNTING:
        counts = state.counts.of(phase)
        (counts.fallbacks if dense is None else counts.dense)[reason.reason] += 1
        counts.add_dense(work)
        _capture(state, phase, reason)


def _may_be_best(state: LayerState, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call that is dense anyway may run on a faster kernel than the model's own."""
    return state.config.dense == "best" and not _window(mask, kwargs)


def _attend_at_best(state: LayerState, call: AttentionCall) -> torch.Tensor | None:
    """`dense: best`: the output `[B, Sq, Hq, Dv]` of the fastest dense kernel; None where none is faster or serves."""
    kernel: str | None
    if call.phase == "decode":
        plan = PagePlan.every(call)
        kernel = "page_decode" if page_decode.fastest(call, plan) == "triton" else None
        output = page_decode.attend(call, plan, "triton")[0] if kernel else None
    else:
        kernel = dense_kernels.fastest(call)
        output = dense_kernels.attend(call, kernel) if kernel else None
    if kernel is None or output is None:
        return None
    if not torch.compiler.is_compiling():
        with COUNTING:
            state.counts.of(call.phase).dense_kernels[kernel] += 1
    return output.transpose(1, 2).contiguous()


def _attend_densely(
    state: LayerState, module: nn.Module, tensors: tuple[torch.Tensor, ...], mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the model did before it was patched."""
    if isinstance(mask, LazyMask):
        mask = mask.build(state.original_config._attn_implementation)
    unpatched: Any = _Unpatched(module, state.original_config)
    return state.dense(unpatched, *tensors, mask, **kwargs)


def _full_work(query: torch.Tensor, key: torch.Tensor) -> Work:
    """The work of a call about whose mask nothing is known: the causal triangle."""
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
    if state.config.on_unsupported == "warn" and reason not in state.warned:
        state.warned.add(reason)
        warnings.warn(f"sparse_patch: {phase} falls back to dense attention: {reason}", stacklevel=2)
