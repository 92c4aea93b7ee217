"""Every private name of Transformers that this package uses. No other module reads one from a model or a config.

Private names change without notice. Each is behind a function or a constant that says what it is. All were checked in
Transformers 5.5.0, 5.17.0 and 5.23.0; differences between these are noted. Public names (`AttentionInterface`,
`get_interface`, the classes of caches and masks) are imported where they are used.
"""

import inspect
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MaskFunction = Callable[..., torch.Tensor | None]  # makes a mask for one implementation; None if it needs none

# --- which attention implementation a config names -------------------------------------------------------------------

IMPLEMENTATION = "_attn_implementation_internal"
"""Where a config stores the name, in `vars(config)` and in its pickled state. 5.5.0 to 5.23.0."""

_IMPLEMENTATION_READ = "_attn_implementation"  # a property of configs; the code of models reads it too


def implementation_of(config: PreTrainedConfig) -> str | None:
    """The name of the attention implementation; None means "eager". Reads `config._attn_implementation`."""
    return config._attn_implementation


def set_implementation(config: PreTrainedConfig, name: str) -> None:
    """Set another implementation, also in the configs inside this one: the property's setter goes through them."""
    config._attn_implementation = name


def set_implementation_of_one(config: PreTrainedConfig, name: str | None) -> None:
    """Set another implementation in this config, and leave the configs inside it as they are."""
    config._attn_implementation_internal = name


def asks_the_interface(code: CodeType) -> bool:
    """Whether the code of a forward looks up its attention function by the config's implementation.

    Models of Transformers do so with `ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, ...)`.
    """
    return {"ALL_ATTENTION_FUNCTIONS", _IMPLEMENTATION_READ} <= set(code.co_names)


# --- masks -----------------------------------------------------------------------------------------------------------


def mask_function_of(implementation: str | None) -> MaskFunction | None:
    """The function that makes the masks of an implementation; None if the implementation gets no mask.

    Reads `ALL_MASK_ATTENTION_FUNCTIONS._global_mapping`, as `create_causal_mask` does. The public lookup also returns
    what was set only on that one object.
    """
    functions: dict[Any, Any] = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    return functions.get(implementation)


def adds_to_causal(mask_function: Any) -> bool:
    """Whether a mask function is the union of causality and something else, as `masking_utils.or_masks` makes it.

    Such a function is recognised by its name, which `or_masks` gives it, and by its closure variable `mask_functions`.
    """
    if getattr(mask_function, "__qualname__", "") != "or_masks.<locals>.or_mask":
        return False
    return causal_mask_function in inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())


_WINDOWS = {
    "sliding_window_overlay.<locals>.inner_mask": "sliding",
    "chunked_overlay.<locals>.inner_mask": "chunked",
}


def kind_of_window(mask_function: Any) -> str | None:
    """ "sliding" or "chunked" if a mask function is causality within such a window and nothing else; else None.

    Such a function is what `masking_utils.and_masks` makes of an overlay and of causality. It is recognised by its name
    and its closure variable `mask_functions`, the overlay by its name.
    """
    if getattr(mask_function, "__qualname__", "") != "and_masks.<locals>.and_mask":
        return None
    functions = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    if len(functions) != 2 or functions[1] is not causal_mask_function:
        return None
    return _WINDOWS.get(getattr(functions[0], "__qualname__", ""))


# --- generation ------------------------------------------------------------------------------------------------------

PREPARE_CACHE = "_prepare_cache_for_generation"
"""The model method with which `generate` makes its cache and puts it into `model_kwargs["past_key_values"]`.

It is called as `(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)`. 5.5.0 to 5.23.0.
"""


def prepare_cache_of_class(model: Any, *args: Any) -> None:
    """Call the class's `PREPARE_CACHE`, even if the model object has another one."""
    getattr(type(model), PREPARE_CACHE)(model, *args)


def dropped_mask_length(generation_config: GenerationConfig) -> int | None:
    """Width of a padding mask that `generate` dropped because it was all ones; None if it dropped none.

    Reads `generation_config._mask_length` of 5.23.0; 5.5.0 and 5.17.0 drop no mask.
    """
    return getattr(generation_config, "_mask_length", None)


def forget_cache_length(model: PreTrainedModel) -> None:
    """Let the next static cache of `generate` be as long as needed, instead of as long as the longest one so far.

    Removes `model._previous_max_cache_length` of 5.17.0 and 5.23.0; 5.5.0 keeps no such length.
    """
    vars(model).pop("_previous_max_cache_length", None)


# --- tensor parallelism ----------------------------------------------------------------------------------------------


def tensor_parallel_mesh(model: PreTrainedModel) -> "tuple[DeviceMesh | None, int | None]":
    """The mesh of processes over which `tp_plan="auto"` split a model, and the number of parts; None if not split.

    Reads `model._device_mesh` and `model._tp_size`. With other kinds of parallelism too, the mesh has a dimension "tp".
    """
    return getattr(model, "_device_mesh", None), getattr(model, "_tp_size", None)
