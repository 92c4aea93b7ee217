"""Patching: attach the hook to a model's attention modules (`discovery.py` finds them), detach it again.

A patch gives the model its own copies of the Transformers configs that its attention reads, with a name of the hook for
the implementation, and a `LayerState` on every attention module. Another model that was built from the same config
object is not touched, and unpatching puts the original config objects back.

Models are patched and unpatched one at a time. Attention is patched first and unpatched last, the config that the masks
are made by in between: a forward that runs meanwhile finishes as it began, or raises PatchError.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from sparse_patch.attention import join_forward, register
from sparse_patch.cache_layers import GrowingLayer
from sparse_patch.caches import Prompt, adopt, note_prompt, prompt_of
from sparse_patch.call import PHASES, Phase
from sparse_patch.config import ConfigSource, PatchConfig, load_config
from sparse_patch.correction import Correction
from sparse_patch.discovery import attention_modules, dispatch_scope
from sparse_patch.errors import PatchError, SparsePatchError, short
from sparse_patch.forward import PatchMark
from sparse_patch.head_shard import HeadShard
from sparse_patch.layer_state import LayerState
from sparse_patch.methods.base import DecodeMethod
from sparse_patch.methods.spans import SpanMethod, Spans
from sparse_patch.model_shape import (
    ModelShape,
    attention_kind,
    can_forget,
    config_of_layer,
    kv_heads_of,
    layer_with_keys,
)
from sparse_patch.names import HOOK, ON_KERNELS, hook_name, is_hook, unpatched_name
from sparse_patch.ops.backends import takes_triton
from sparse_patch.plans import Plan
from sparse_patch.report import COUNTING, LayerCounts, LayerReport, SparsityReport
from sparse_patch.rings import RingLayer, SpansOf
from sparse_patch.unpatched import copies_are_plain, unpatched_config, unpatched_function
from sparse_patch.version import __version__

_PREPARE = "_prepare_cache_for_generation"  # the method of Transformers' models that makes the cache of `generate`
_PATCHING = RLock()


@dataclass
class Patch:
    """What a patched model carries, as its attribute `sparse_patch`: enough to undo the patch.

    Attributes:
        config: the configuration in force.
        attention: the patched attention modules, in the order of their layers.
        own_configs: the model's copies of Transformers configs.
        holders: the modules that were given one of them.
        hooks: what tells a forward which cache it uses, and what corrects that cache.
        mark: tells forwards whether they still run under this patch.
    """

    config: PatchConfig
    attention: list[nn.Module]
    own_configs: list["OwnConfig"]
    holders: list[nn.Module]
    hooks: list[RemovableHandle]
    mark: PatchMark


@dataclass
class OwnConfig:
    """A Transformers config that was replaced by a copy.

    Attributes:
        original: what the model has without the patch.
        copy: what it has instead.
        attributes: those of the copy as they were when the model was patched.
        hook: the kind of hook that the copy names, where attention reads it.
    """

    original: PreTrainedConfig
    copy: PreTrainedConfig
    attributes: dict[str, Any]
    hook: str | None = None

    def name_hook(self, kind: str) -> None:
        """Let attention that reads the copy call the hook."""
        unpatched = unpatched_name(self.original._attn_implementation)
        register(unpatched)
        self.hook, self.copy._attn_implementation = kind, hook_name(unpatched, kind)
        for config in (self.copy, *(getattr(self.copy, name, None) for name in self.copy.sub_configs)):
            if isinstance(config, PreTrainedConfig):
                copies_are_plain(type(config))

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of a patched model; one that was given another implementation since stays without the hook."""
        return {**vars(self), "hook": self.hook if is_hook(self.copy._attn_implementation) else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A patched model was copied, or loaded whole, maybe where nothing was patched yet."""
        vars(self).update(state)
        if self.hook is not None:
            self.name_hook(self.hook)

    def carry_over_changes(self) -> None:
        """Set on the original what was set on the copy while the model was patched (`resize_token_embeddings`, ...)."""
        for key, value in vars(self.copy).items():
            if key != "_attn_implementation_internal" and self.attributes.get(key, self) is not value:
                setattr(self.original, key, value)


def patch_model(
    model: nn.Module, config: ConfigSource | Sequence[ConfigSource] | PatchConfig, /, **overrides: Any
) -> nn.Module:
    """Make a Transformers model run sparse attention. The model is changed in place and returned.

    Args:
        model: a decoder of Transformers, or anything that wraps one (a LoRA model; a vision-language model, of which
            the text tower is patched).
        config: a path, the name of a packaged configuration, a dict, or a list of these; see `load_config`.
        **overrides: fields to change, `prefill={"gamma": 0.9}`.

    Raises:
        ConfigError: the configuration is not valid, or names layers that the model does not have.
        PatchError: the model is patched already, or its attention cannot be reached. The model is as it was.
    """
    settings = _settings(config, overrides)
    with _PATCHING:
        root = transformers_model(model)
        attention = attention_modules(root)
        states = _states(root, settings, attention)
        _attach(model, root, attention, states)
    return model


def _attach(
    model: nn.Module, root: PreTrainedModel, attention: dict[str, nn.Module], states: Sequence[LayerState]
) -> None:
    """Put the patch on a model: on its attention first, so that no forward meets half of it."""
    modules, settings, mark = list(attention.values()), states[0].config, states[0].patch
    kind = ON_KERNELS if _decodes_on_kernels(root, states, modules) else HOOK
    holders = [module for module in model.modules() if _takes_own_config(module, attention)]
    own_configs = _own_configs(holders)
    for module, state in zip(modules, states, strict=True):
        own_configs[id(_config_of(module))].name_hook(kind)
        module.sparse_patch = state  # type: ignore[assignment]
    hooks = [module.register_forward_pre_hook(join_forward, with_kwargs=True) for module in modules]
    if isinstance(settings.decode, DecodeMethod) and settings.decode.correct_every is not None:
        correction = Correction(settings.decode.correct_every, settings.on_unsupported == "warn")
        hooks.append(root.register_forward_pre_hook(correction, with_kwargs=True))
    patch = Patch(settings, modules, list(own_configs.values()), holders, hooks, mark)
    root.sparse_patch = patch  # type: ignore[assignment]
    for module in (*modules, *(holder for holder in holders if holder not in attention.values())):
        module.config = own_configs[id(_config_of(module))].copy  # type: ignore[assignment]
    if isinstance(root, GenerationMixin):
        vars(root)[_PREPARE] = partial(_prepare_cache, root)  # in the way of the class's own


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undo `patch_model`: the model computes what it computed before, bit for bit. Returns the model.

    A forward that runs meanwhile finishes as it began, or raises PatchError.

    Raises:
        PatchError: the model is not patched.
    """
    with _PATCHING:
        root = transformers_model(model)
        patch = _patch_of(root)
        patch.mark.active = False
        vars(root).pop(_PREPARE, None)
        originals = {id(own.copy): own.original for own in patch.own_configs}
        ordered = [module for module in (*patch.holders, *model.modules()) if module not in patch.attention]
        for module in (*ordered, *patch.attention):  # the model may have been wrapped since
            if id(vars(module).get("config")) in originals:
                module.config = originals[id(module.config)]  # type: ignore[assignment]
        for own in patch.own_configs:
            own.carry_over_changes()
            own.copy._attn_implementation_internal = unpatched_name(own.copy._attn_implementation)
        for hook in patch.hooks:
            hook.remove()
        for module in patch.attention:
            del module.sparse_patch
        del root.sparse_patch
    return model


@contextmanager
def patched(
    model: nn.Module, config: ConfigSource | Sequence[ConfigSource] | PatchConfig, /, **overrides: Any
) -> Iterator[nn.Module]:
    """`patch_model` for a `with` block; unpatches at its end, also after an exception."""
    patch_model(model, config, **overrides)
    try:
        yield model
    finally:
        unpatch_model(model)


def sparsity_report(model: nn.Module) -> SparsityReport:
    """What the model computed since it was patched, or since `reset_report`, layer by layer and head by head.

    Raises:
        PatchError: the model is not patched.
    """
    with _PATCHING:
        patch, states = _patch_of(transformers_model(model)), _states_on(model)
        active = all(is_hook(_config_of(module)._attn_implementation) for module in patch.attention)
    with COUNTING:
        layers = [_layer_report(state) for state in states]
    return SparsityReport(
        config=patch.config.settings(),
        source=patch.config.source,
        fingerprint=patch.config.fingerprint(),
        hook_active=active,
        versions=versions(),
        layers=layers,
        remarks=_remarks(states[0]),
    )


def _remarks(state: LayerState) -> list[str]:
    """What the methods say, each thing once, and which heads are counted; of any layer."""
    methods = (state.config.method(phase) for phase in PHASES)
    remarks = list(dict.fromkeys(remark for method in methods if method and (remark := method.remark())))
    if state.shard.size > 1:
        remarks.append(f"tensor parallelism: only the heads of rank {state.shard.rank} of {state.shard.size}")
    return remarks


def span_cache(model: nn.Module, max_length: int) -> DynamicCache:
    """The cache that `generate` makes for a model as it is patched, for forwards of your own or for a longer text.

    Layers whose decode method has spans (`moa`, `duoattention`, `streamingllm`) keep what these have and forget the
    rest; the others keep everything.

    Args:
        model: the model, patched or not.
        max_length: tokens of prompt and answer together, padding included, in all turns.

    Returns:
        An empty cache, for this model while it is patched so.

    Raises:
        PatchError: the model is none of Transformers.
        SparsePatchError: `max_length` is no number of tokens.
    """
    root = transformers_model(model)
    if not isinstance(max_length, int) or max_length < 1:
        raise SparsePatchError(f"span_cache: max_length: expected a number of tokens above 0, got {short(max_length)}")
    cache = DynamicCache(config=root.config)
    adopt(cache, spans_of(root), max_length)
    return cache


def spans_of(root: PreTrainedModel) -> dict[int, SpansOf]:
    """The spans of the layers that decode by spans and can have a ring, by layer."""
    config = root.config.get_text_config(decoder=True)
    with _PATCHING:
        modules = _patch_of(root).attention if is_patched(root) and can_forget(config) else []
        states = [state_of(module) for module in modules]
    spans: dict[int, SpansOf] = {}
    for module, state in zip(modules, states, strict=True):
        method = state.config.decode if "decode" in state.phases else None
        served = attention_kind(config, state.layer) == "full" and getattr(module, "sinks", None) is None
        if isinstance(method, SpanMethod) and served:
            in_all = kv_heads_of(config_of_layer(config, state.layer))
            spans[state.layer] = partial(_spans_here, method, state.shard, state.layer, in_all)
    return spans


def _spans_here(method: SpanMethod, shard: HeadShard, layer: int, in_all: int, length: int, kv_heads: int) -> Spans:
    """The spans of the `kv_heads` KV heads that this process has of a layer's `in_all`."""
    return method.spans_of(shard.of_layer(kv_heads, in_all), layer, length, kv_heads)


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
    for state in _states_on(model):
        state.counts = LayerCounts()


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_model` changed this model and `unpatch_model` did not change it back yet."""
    return isinstance(getattr(transformers_model(model), "sparse_patch", None), Patch)


@contextmanager
def uncounted(model: nn.Module) -> Iterator[None]:
    """Leave what runs in a `with` block out of `sparsity_report`: warm-ups, trials of batch sizes.

    Raises:
        PatchError: the model is not patched.
    """
    states = _states_on(model)
    counts = [state.counts for state in states]
    for state in states:
        state.counts = LayerCounts()
    try:
        yield
    finally:
        for state, count in zip(states, counts, strict=True):
            state.counts = count


@contextmanager
def capture_plans(model: nn.Module) -> Iterator[dict[int, list[tuple[Phase, Plan]]]]:
    """Keep the plans of the calls that run in a `with` block, by layer, oldest first: for pictures and for tests.

    Raises:
        PatchError: the model is not patched.
    """
    states = _states_on(model)
    captured: dict[int, list[tuple[Phase, Plan]]] = {}
    for state in states:
        state.captured = captured.setdefault(state.layer, [])
    try:
        yield captured
    finally:
        for state in states:
            state.captured = None


def _states_on(model: nn.Module) -> list[LayerState]:
    """The states of a patched model's layers, while no other thread unpatches it."""
    with _PATCHING:
        return [state_of(module) for module in _patch_of(transformers_model(model)).attention]


def state_of(module: nn.Module) -> LayerState:
    """The state of a patched attention module."""
    state = module.sparse_patch
    assert isinstance(state, LayerState)
    return state


def _prepare_cache(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: GenerationMode,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """What `generate` makes when the user passes no cache, with layers that do not copy and that have a memory.

    Where candidates are taken back (assisted decoding) every layer keeps everything.
    """
    given = model_kwargs.get("past_key_values")
    getattr(type(self), _PREPARE)(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, Cache):
        return
    is_assistant = bool(getattr(generation_config, "is_assistant", False))  # says who generates the candidates
    verifies = generation_mode == GenerationMode.ASSISTED_GENERATION
    if given is None:
        adopt(cache, None if is_assistant or verifies else spans_of(self), max_cache_length)
    if not (is_assistant and prompt_of(given)):  # an assistant is asked again and again about one text
        end = _prompt_length(generation_config, model_kwargs)
        note_prompt(cache, None if end is None else Prompt(end, verifies))
    for layer in cache.layers:
        if isinstance(layer, RingLayer | GrowingLayer):
            layer.make_room(max_cache_length)


def _prompt_length(generation_config: Any, model_kwargs: dict[str, Any]) -> int | None:
    """Tokens of the prompt, with those that the cache has and padding; None where `generate` does not say."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return int(mask.shape[1])
    length: int | None = getattr(generation_config, "_mask_length", None)  # of a mask that was all ones
    if length is None and generation_config.max_new_tokens is not None:
        length = generation_config.max_length - generation_config.max_new_tokens
    return length


def _settings(config: ConfigSource | Sequence[ConfigSource] | PatchConfig, overrides: dict[str, Any]) -> PatchConfig:
    if not isinstance(config, PatchConfig):
        return load_config(config, **overrides)
    return load_config(config.settings(), **overrides) if overrides else config


def _decodes_on_kernels(root: PreTrainedModel, states: Sequence[LayerState], attention: Sequence[nn.Module]) -> bool:
    """Whether no decode step is expected to run what the model had before: then no masks are made for it.

    A step that does so all the same (a fallback) makes its mask itself.
    """
    shape = ModelShape.of(root.config, 1 + max(state.layer for state in states))
    own_kernels = states[0].config.dense == "best" and takes_triton(next(root.parameters()))
    return own_kernels and not shape.local_layers and all(getattr(m, "sinks", None) is None for m in attention)


def _config_of(module: nn.Module) -> PreTrainedConfig:
    config = module.config
    assert isinstance(config, PreTrainedConfig)
    return config


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The Transformers model in a module: itself, or what a wrapper (a LoRA model, ...) holds.

    Raises:
        PatchError: there is none.
    """
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise PatchError(f"{type(model).__name__} is not a Transformers model and holds none; pass a PreTrainedModel")


def _patch_of(root: PreTrainedModel) -> Patch:
    patch = getattr(root, "sparse_patch", None)
    if not isinstance(patch, Patch):
        raise PatchError(f"{type(root).__name__} is not patched; call patch_model first")
    return patch


def _states(root: PreTrainedModel, config: PatchConfig, attention: dict[str, nn.Module]) -> list[LayerState]:
    num_layers = 1 + max(int(module.layer_idx) for module in attention.values())  # type: ignore[arg-type]
    text = root.config.get_text_config(decoder=True)
    config = config.for_model(ModelShape.of(text, num_layers))
    selected = {phase: config.layers(phase, num_layers) for phase in PHASES}
    warned: set[str] = set()
    shard, mark = HeadShard.of(root), PatchMark()
    states = []
    for name, module in attention.items():
        layer, original = int(module.layer_idx), unpatched_config(_config_of(module))  # type: ignore[arg-type]
        states.append(
            LayerState(
                name=name,
                layer=layer,
                cache_layer=layer_with_keys(text, layer),
                kind=attention_kind(text, layer),
                config=config,
                patch=mark,
                phases=frozenset(phase for phase in PHASES if layer in selected[phase]),
                original_config=original,
                dense=unpatched_function(module, original),
                warned=warned,
                shard=shard,
            )
        )
    return states


def _takes_own_config(module: nn.Module, attention: dict[str, nn.Module]) -> bool:
    """Whether a module is given a copy of its config; attention that is not patched keeps what it has, and its name."""
    config = vars(module).get("config")
    if not isinstance(config, PreTrainedConfig):
        return False
    of_decoder = any(config is _config_of(patched) for patched in attention.values())
    return not of_decoder or module in attention.values() or dispatch_scope(module) is None


def _own_configs(holders: list[nn.Module]) -> dict[int, OwnConfig]:
    """Copies of the configs of modules, by the id of the config now; configs that were one object stay one."""
    memo: dict[int, Any] = {}
    owned: dict[int, OwnConfig] = {}
    for module in holders:
        original = _config_of(module)
        own = copy.deepcopy(original, memo)
        owned[id(original)] = OwnConfig(original, own, dict(vars(own)))
    return owned


def _layer_report(state: LayerState) -> LayerReport:
    method = {phase: state.config.method(phase) if phase in state.phases else None for phase in PHASES}
    return LayerReport(
        layer=state.layer,
        name=state.name,
        prefill_method=method["prefill"].method if method["prefill"] else None,
        decode_method=method["decode"].method if method["decode"] else None,
        prefill=state.counts.prefill.report(),
        decode=state.counts.decode.report(),
        compiled=state.counts.compiled,
    )
