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
from functools import partial
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from sparse_patch.call import PHASES
from sparse_patch.config import ConfigSource, PatchConfig, load_config
from sparse_patch.errors import SparsePatchError
from sparse_patch.integration.discovery import attention_modules, dispatch_scope
from sparse_patch.integration.forward import PatchMark
from sparse_patch.integration.generation_cache import COMPILED_CALL, compiled_call, prepare_cache
from sparse_patch.integration.graphs.forward import install, remove
from sparse_patch.integration.hook import join_forward
from sparse_patch.integration.kv_correction import Correction
from sparse_patch.integration.layer_state import LayerState
from sparse_patch.integration.names import HOOK, ON_KERNELS, unpatched_name
from sparse_patch.integration.patch import (
    PATCHING,
    OwnConfig,
    Patch,
    config_of,
    is_patched,
    patch_of,
    states_on,
    transformers_model,
)
from sparse_patch.integration.transformers_internals import (
    PREPARE_CACHE,
    implementation_of,
    set_implementation_of_one,
    tensor_parallel_mesh,
)
from sparse_patch.integration.unpatched import unpatched_config, unpatched_function
from sparse_patch.kernels.availability import prefers_triton
from sparse_patch.model_shape import (
    ModelShape,
    attention_kind,
    config_of_layer,
    layer_with_keys,
)
from sparse_patch.report import CompiledCounts
from sparse_patch.tensor_parallel import HeadShard


def patch_model(
    model: nn.Module,
    config: ConfigSource | Sequence[ConfigSource] | PatchConfig | None = None,
    /,
    *,
    replace: bool = False,
    **overrides: Any,
) -> nn.Module:
    """Make a Transformers model run sparse attention. The model is changed in place and returned.

        patch_model(model, "flexprefill.yaml")
        patch_model(model, "flexprefill", prefill={"gamma": 0.9})
        patch_model(model, prefill=FlexPrefill(gamma=0.9), decode=Quest(budget=4096))

    Args:
        model: a decoder of Transformers, or anything that wraps one (a LoRA model; a vision-language model, of which
            the text tower is patched).
        config: a path, the name of a packaged configuration, a dict, a method, or a list of these; see `load_config`.
            None if the overrides say everything.
        replace: whether a model that is patched already is patched anew; its report starts again.
        **overrides: the phases, as methods or as fields to change, and the other fields of `PatchConfig`.

    Raises:
        ConfigError: the configuration is not valid, or names layers that the model does not have. The model is as it
            was, as after a PatchError.
        PatchError: the model is patched already and not to be replaced, or its attention cannot be reached.
    """
    settings = _settings(config, overrides)
    with PATCHING:
        root = transformers_model(model)
        if replace and is_patched(root):
            return _replace(model, root, settings)
        attention = attention_modules(root)
        states = _states(root, settings, attention)
        _attach(model, root, attention, states)
    return model


def _replace(model: nn.Module, root: PreTrainedModel, settings: PatchConfig) -> nn.Module:
    """Patch a patched model anew; if that cannot be done it keeps its patch and what it counted."""
    states = states_on(root)
    unpatch_model(model)
    try:
        return patch_model(model, settings)
    except SparsePatchError:
        states[0].patch.active = True
        _attach(model, root, attention_modules(root), states)
        raise


def _attach(
    model: nn.Module, root: PreTrainedModel, attention: dict[str, nn.Module], states: Sequence[LayerState]
) -> None:
    """Put the patch on a model: on its attention first, so that no forward meets half of it."""
    modules, settings, mark = list(attention.values()), states[0].config, states[0].patch
    kind = ON_KERNELS if _decodes_on_kernels(root, states) else HOOK
    holders = [module for module in model.modules() if _takes_own_config(module, attention)]
    own_configs = _own_configs(holders)
    for module, state in zip(modules, states, strict=True):
        own_configs[id(config_of(module))].name_hook(kind)
        module.sparse_patch = state  # type: ignore[assignment]
    hooks = [module.register_forward_pre_hook(join_forward, with_kwargs=True) for module in modules]
    decoder = next((state.decoder for state in states if state.decoder is not None), None)
    if decoder is not None and decoder.correct_every is not None:
        correction = Correction(decoder.correct_every, settings.on_unsupported == "warn")
        hooks.append(root.register_forward_pre_hook(correction, with_kwargs=True))
    has_spans = any(state.decoder is not None and state.decoder.retention is not None for state in states)
    patch = Patch(settings, modules, list(own_configs.values()), holders, has_spans, hooks, mark)
    root.sparse_patch = patch  # type: ignore[assignment]
    for module in (*modules, *(holder for holder in holders if holder not in attention.values())):
        module.config = own_configs[id(config_of(module))].copy  # type: ignore[assignment]
    if isinstance(root, GenerationMixin):
        vars(root)[PREPARE_CACHE] = partial(prepare_cache, root)  # in the way of the class's own
        vars(root)[COMPILED_CALL] = partial(compiled_call, root)
        install(root)


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undo `patch_model`: the model computes what it computed before, bit for bit. Returns the model.

    A forward that runs meanwhile finishes as it began, or raises PatchError.

    Raises:
        PatchError: the model is not patched.
    """
    with PATCHING:
        root = transformers_model(model)
        patch = patch_of(root)
        patch.mark.active = False
        patch.mark.tallies.clear()
        for method in (PREPARE_CACHE, COMPILED_CALL):
            vars(root).pop(method, None)
        remove(root)
        originals = {id(own.copy): own.original for own in patch.own_configs}
        ordered = [module for module in (*patch.holders, *model.modules()) if module not in patch.attention]
        for module in (*ordered, *patch.attention):  # the model may have been wrapped since
            if id(vars(module).get("config")) in originals:
                module.config = originals[id(module.config)]  # type: ignore[assignment]
        for own in patch.own_configs:
            own.carry_over_changes()
            set_implementation_of_one(own.copy, unpatched_name(implementation_of(own.copy)))
        for hook in patch.hooks:
            hook.remove()
        for module in patch.attention:
            del module.sparse_patch
        del root.sparse_patch
    return model


@contextmanager
def patched(
    model: nn.Module, config: ConfigSource | Sequence[ConfigSource] | PatchConfig | None = None, /, **overrides: Any
) -> Iterator[nn.Module]:
    """`patch_model` for a `with` block; unpatches at its end, also after an exception."""
    patch_model(model, config, **overrides)
    try:
        yield model
    finally:
        unpatch_model(model)


def _settings(
    config: ConfigSource | Sequence[ConfigSource] | PatchConfig | None, overrides: dict[str, Any]
) -> PatchConfig:
    if not isinstance(config, PatchConfig):
        return load_config(config, **overrides)
    return load_config(config.settings(), **overrides) if overrides else config


def _decodes_on_kernels(root: PreTrainedModel, states: Sequence[LayerState]) -> bool:
    """Whether no decode step is expected to run what the model had before: then no masks are made for it.

    A step that does so all the same (a fallback) makes its mask itself.
    """
    shape = ModelShape.of(root.config, 1 + max(state.layer for state in states))
    own_kernels = states[0].config.dense == "best" and prefers_triton(next(root.parameters()))
    return own_kernels and not shape.local_layers


def _states(root: PreTrainedModel, config: PatchConfig, attention: dict[str, nn.Module]) -> list[LayerState]:
    num_layers = 1 + max(int(module.layer_idx) for module in attention.values())  # type: ignore[arg-type]
    text = root.config.get_text_config(decoder=True)
    bound = config.bind(ModelShape.of(text, num_layers))
    selected = {phase: config.layers(phase, num_layers) for phase in PHASES}
    warned: set[str] = set()
    shard, mark = HeadShard.of(*tensor_parallel_mesh(root)), PatchMark()
    states = []
    for name, module in attention.items():
        layer, original = int(module.layer_idx), unpatched_config(config_of(module))  # type: ignore[arg-type]
        states.append(
            LayerState(
                name=name,
                layer=layer,
                cache_layer=layer_with_keys(text, layer),
                kind=attention_kind(text, layer),
                config=bound.settings,
                patch=mark,
                methods={
                    phase: method
                    for phase in PHASES
                    if layer in selected[phase] and (method := bound.method(phase)) is not None
                },
                original_config=original,
                dense=unpatched_function(module, original),
                warned=warned,
                shard=shard,
                in_graphs=_counts_of_graphs(module, config_of_layer(text, layer), shard),
            )
        )
    return states


def _counts_of_graphs(module: nn.Module, config: PreTrainedConfig, shard: HeadShard) -> CompiledCounts | None:
    """Where `torch.compile` graphs count the calls of a layer; None if its weights are nowhere yet."""
    weight = next(module.parameters(), None)
    if weight is None or weight.is_meta:
        return None
    return CompiledCounts.zeros(int(config.num_attention_heads) // shard.size, weight.device)


def _takes_own_config(module: nn.Module, attention: dict[str, nn.Module]) -> bool:
    """Whether a module is given a copy of its config; attention that is not patched keeps what it has, and its name."""
    config = vars(module).get("config")
    if not isinstance(config, PreTrainedConfig):
        return False
    of_decoder = any(config is config_of(patched) for patched in attention.values())
    return not of_decoder or module in attention.values() or dispatch_scope(module) is None


def _own_configs(holders: list[nn.Module]) -> dict[int, OwnConfig]:
    """Copies of the configs of modules, by the id of the config now; configs that were one object stay one."""
    memo: dict[int, Any] = {}
    owned: dict[int, OwnConfig] = {}
    for module in holders:
        original = config_of(module)
        own = copy.deepcopy(original, memo)
        owned[id(original)] = OwnConfig(original, own, dict(vars(own)))
    return owned
