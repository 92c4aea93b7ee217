"""The rows of the decode benchmark: kernels on all keys and on random lists, single layers and all layers."""

from dataclasses import replace
from functools import partial

import torch
from transformers import Cache

from sparse_patch.bench import decode_kernels
from sparse_patch.bench.decode_step import method_of, run_layer, run_stack
from sparse_patch.bench.decode_timing import OURS, Layers, Row, bytes_of
from sparse_patch.call import AttentionCall, ForwardState
from sparse_patch.config import BoundConfig
from sparse_patch.errors import UnsupportedCallError, reason
from sparse_patch.integration.caches.rings import FixedRingLayer
from sparse_patch.integration.caches.size import cache_bytes
from sparse_patch.kernels.room import SPARE
from sparse_patch.ops.attention import table
from sparse_patch.ops.selection.page_scores import page_scores
from sparse_patch.ops.selection.top_pages import top_pages
from sparse_patch.plans import PagePlan
from sparse_patch.tensor_parallel import ALL_HEADS


def ours(layers: Layers) -> Row:
    """Time `page_decode` on every key."""

    def step() -> None:
        for call in layers.calls:
            table.attend(call, PagePlan.every(call))

    return layers.row(
        "dense", f"{OURS} ({layers.backend})", step, bytes_of(layers.calls[0], PagePlan.every(layers.calls[0]))
    )


def other_kernel(layers: Layers, kernel: str) -> Row:
    """Time a dense kernel of another project; raise UnsupportedCallError if it does not support the calls."""
    if problem := decode_kernels.why_unsupported(layers.calls[0], kernel):
        raise UnsupportedCallError(problem)
    attends = [decode_kernels.prepared(call, layers.length, kernel) for call in layers.calls]
    try:
        attends[0]()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the kernel is not ours, so its error must not end the run
        raise UnsupportedCallError(reason(error)) from None

    def step() -> None:
        for attend in attends:
            attend()

    size = bytes_of(layers.calls[0], PagePlan.every(layers.calls[0]))
    return layers.row("dense", kernel, step, size, kernel=kernel)


def random_lists_row(layers: Layers, label: str, budget: int, lists: int, page: int) -> Row:
    """Time `page_decode` on random lists, which differ between layers."""
    plans = [random_lists(call, layers.length, budget, lists, page, seed) for seed, call in enumerate(layers.calls)]

    def step() -> None:
        for call, plan in zip(layers.calls, plans, strict=True):
            table.attend(call, plan)

    return layers.row("lists", label, step, bytes_of(layers.calls[0], plans[0]))


def selecting_layer(layers: Layers, budget: int, page: int) -> Row:
    """Time dense attention with logits, page scores and top pages."""

    def select(call: AttentionCall) -> None:
        _, lse, logits = table.attend(call, PagePlan.every(call, page, wants_logits=True))
        assert lse is not None and logits is not None, "the plan wants them"
        lengths = call.lengths()
        scores = page_scores(logits, lse[..., -1], lengths, page)
        top_pages(scores[:, None], lengths, -(-budget // page), page)

    def step() -> None:
        for call in layers.calls:
            select(call)

    plan = PagePlan.every(layers.calls[0], page, wants_logits=True)
    return layers.row("select", f"dense, logits, top {budget} tokens", step, bytes_of(layers.calls[0], plan))


def one_layer(layers: Layers, name: str, config: BoundConfig, role: str, layer: int) -> Row:
    """Time a layer of one role, with the list that the selecting layer before it passes on."""
    layers.forget()
    forward_state = forward_state_to(config, layers.calls[0], layer)
    calls = [replace(call, layer=layer) for call in layers.calls]
    own = replace(calls[0], forward_state=dict(forward_state))
    size = bytes_of(own, run_layer(config, own))

    def step() -> None:
        for call in calls:
            run_layer(config, replace(call, forward_state=dict(forward_state)))

    return layers.row("layer", f"{name}: {role}", step, size, config=name)


def all_layers(layers: Layers, name: str, config: BoundConfig) -> Row:
    """Time all layers, each in its role."""
    layers.forget()
    plans = run_stack(config, layers.calls)
    size = sum(bytes_of(*pair) for pair in zip(layers.calls, plans, strict=True)) / len(plans)
    return layers.row(
        "stack", f"{name}: {len(plans)} layers", lambda: run_stack(config, layers.calls), size, config=name
    )


def all_layers_of_spans(layers: Layers, name: str, config: BoundConfig) -> Row:
    """Time all layers on what a static cache keeps for spans: full rings, or all keys in layers without a ring."""
    used = config.settings.layers("decode", len(layers.calls))
    rings = [full_ring(config, call, layers.length) if call.layer in used else None for call in layers.calls]
    before = torch.full((len(layers.calls[0].q),), layers.length, device=layers.calls[0].q.device)
    own = [replace(call, k=call.k[:, :, :1], v=call.v[:, :, :1], kv_end=None) for call in layers.calls]

    def step() -> None:
        for ring, call, token in zip(rings, layers.calls, own, strict=True):
            if ring is None:
                table.attend(call, PagePlan.every(call), config.settings.backend)
            else:
                ring.attend(token, before, config.settings.backend)

    every = bytes_of(layers.calls[0], PagePlan.every(layers.calls[0]))
    kept = cache_bytes(Cache(layers=[ring for ring in rings if ring is not None])).allocated
    size = (kept + every * rings.count(None)) / len(rings)
    return layers.row("stack", f"{name}: {len(rings)} layers", step, size, config=name)


def full_ring(config: BoundConfig, call: AttentionCall, length: int) -> FixedRingLayer:
    """One layer's ring of a static cache that has seen `length` tokens, with random keys and values."""
    retention = method_of(config).retention
    assert retention is not None, "checked by ways"
    ring = FixedRingLayer(partial(retention.spans_of, ALL_HEADS, call.layer), length + SPARE)
    ring.lazy_initialization(call.k, call.v)
    assert ring.keys is not None and ring.values is not None
    ring.keys.normal_(), ring.values.normal_()
    ring.seen.fill_(length)
    return ring


def forward_state_to(config: BoundConfig, call: AttentionCall, layer: int) -> ForwardState:
    """The state that earlier layers pass on to `layer`. The selecting ones run here, all on the keys of `call`."""
    forward_state: ForwardState = {}
    method = method_of(config)
    for before in sorted(config.settings.layers("decode", layer + 1) - {layer}):
        if method.role(before) == "select":
            run_layer(config, replace(call, layer=before, forward_state=forward_state))
    return forward_state


def random_lists(call: AttentionCall, length: int, budget: int, lists: int, page_size: int, seed: int = 0) -> PagePlan:
    """Lists of random pages that fill the budget and include the last page. Each list is drawn separately."""
    pages, wanted = -(-length // page_size), -(-budget // page_size)
    if wanted > pages:
        raise UnsupportedCallError(f"the budget is more than {length} tokens")
    generator = torch.Generator(call.q.device).manual_seed(seed)
    chance = torch.rand(call.q.shape[0], lists, pages, generator=generator, device=call.q.device)
    chance[..., -1] = 2.0
    chosen = chance.topk(wanted, -1).indices.sort(-1).values.int()
    return PagePlan.of(call, chosen, torch.full_like(chosen[..., 0], wanted), page_size)
