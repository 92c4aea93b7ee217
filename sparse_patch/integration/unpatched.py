"""What a model computes without a patch: its config, its attention function, and a dense call as before the patch."""

import copyreg
from copy import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from sparse_patch.integration.discovery import dispatch_scope
from sparse_patch.integration.layer_state import AttentionFunction
from sparse_patch.integration.masks import LazyMask
from sparse_patch.integration.names import is_hook, unpatched_name
from sparse_patch.integration.request import Request
from sparse_patch.integration.transformers_internals import IMPLEMENTATION, implementation_of, set_implementation_of_one


class _Unpatched:
    """The module as its own attention function knows it: with its config before the patch, otherwise unchanged."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def attend_unpatched(
    module: nn.Module, tensors: tuple[torch.Tensor, ...], mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend for a module that was made from a patched model's config and has no patch itself."""
    if isinstance(mask, LazyMask):
        mask.forward.check_patched()
    config = unpatched_config(module.config)
    return _attend_with(config, unpatched_function(module, config), module, tensors, mask, kwargs)


def unpatched_config(config: Any) -> Any:
    """A config as it is without the patch: itself, or a copy with the implementation in the hook's name."""
    if not is_hook(implementation_of(config)):
        return config
    config, name = copy(config), unpatched_name(implementation_of(config))
    set_implementation_of_one(config, name)
    return config


def copies_are_plain(kind: type[PreTrainedConfig]) -> None:
    """Make copies and pickles of a class's configs free of the patch, so that the patch never leaves with a config.

    Only the class can say how its objects are pickled. Calling again has no effect.
    """
    copyreg.pickle(kind, _reduced)


def _reduced(config: PreTrainedConfig) -> Any:
    """The pickled form of a config, with the unpatched implementation."""
    reduced: Any = config.__reduce_ex__(4)
    make, args, state, *others = reduced
    name = state.get(IMPLEMENTATION)
    return make, args, {**state, IMPLEMENTATION: unpatched_name(name)} if is_hook(name) else state, *others


def unpatched_function(module: nn.Module, config: Any) -> AttentionFunction:
    """The attention function of the implementation that an unpatched config names."""
    scope = dispatch_scope(module)
    assert scope is not None, "a module that reached the hook asks the attention interface"
    function: AttentionFunction = scope["ALL_ATTENTION_FUNCTIONS"].get_interface(
        implementation_of(config), scope.get("eager_attention_forward")
    )
    return function


def attend_densely(request: Request) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as the model did before it was patched."""
    config, function = request.state.original_config, request.state.dense
    kwargs = {"scaling": request.scaling, **request.kwargs}
    return _attend_with(config, function, request.module, request.tensors, request.mask, kwargs)


def _attend_with(
    config: Any,
    function: AttentionFunction,
    module: nn.Module,
    tensors: tuple[torch.Tensor, ...],
    mask: Any,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend with a config's attention function, and with the mask that this implementation gets."""
    if isinstance(mask, LazyMask):
        mask = mask.build(implementation_of(config))
    return function(_Unpatched(module, config), *tensors, mask, **kwargs)
