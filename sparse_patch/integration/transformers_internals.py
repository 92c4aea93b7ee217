"""Every private name of Transformers that this package uses: nothing else in it reads one off a model or a config.

Private names change without notice. Each is behind a function or a constant that says what it is. All were looked up in
Transformers 5.5.0, 5.17.0 and 5.23.0; where these differ, it is said. What is public (`AttentionInterface`,
`get_interface`, the classes of caches and masks) is imported where it is used.
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

MaskFunction = Callable[..., torch.Tensor | None]  # makes a mask for one implementation; None where it needs none

# --- which attention implementation a config names -------------------------------------------------------------------

IMPLEMENTATION = "_attn_implementation_internal"
"""Where a config stores the name, in `vars(config)` and in what pickle gets. 5.5.0 to 5.23.0."""

_IMPLEMENTATION_READ = "_attn_implementation"  # a property of configs; code of models reads it too


def implementation_of(config: PreTrainedConfig) -> str | None:
    """The name of the attention implementation; None is read as "eager". `config._attn_implementation`."""
    return config._attn_implementation


def set_implementation(config: PreTrainedConfig, name: str) -> None:
    """Name another implementation, in the configs inside of this one too: the property's setter goes through them."""
    config._attn_implementation = name


def set_implementation_of_one(config: PreTrainedConfig, name: str | None) -> None:
    """Name another implementation in this config, and leave the configs inside of it as they are."""
    config._attn_implementation_internal = name


def asks_the_interface(code: CodeType) -> bool:
    """Whether the code of a forward looks its attention function up by the config's implementation.

    Models of Transformers do so by `ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, ...)`.
    """
    return {"ALL_ATTENTION_FUNCTIONS", _IMPLEMENTATION_READ} <= set(code.co_names)


# --- masks -----------------------------------------------------------------------------------------------------------


def mask_function_of(implementation: str | None) -> MaskFunction | None:
    """What makes the masks of an implementation; None for one that gets no mask.

    `ALL_MASK_ATTENTION_FUNCTIONS._global_mapping`, which `create_causal_mask` asks as well. The public lookup has what
    was set on the one object beside it.
    """
    functions: dict[Any, Any] = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    return functions.get(implementation)


def adds_to_causal(mask_function: Any) -> bool:
    """Whether a mask function is the union of causality and something else, as `masking_utils.or_masks` makes it.

    Known by the name of the function that `or_masks` returns, and by what that closes over as `mask_functions`.
    """
    if getattr(mask_function, "__qualname__", "") != "or_masks.<locals>.or_mask":
        return False
    return causal_mask_function in inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())


# --- generation ------------------------------------------------------------------------------------------------------

PREPARE_CACHE = "_prepare_cache_for_generation"
"""The method of models by which `generate` makes its cache, and puts it into `model_kwargs["past_key_values"]`.

Called as `(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)`. 5.5.0 to 5.23.0.
"""


def prepare_cache_of_class(model: Any, *args: Any) -> None:
    """What a model's class does in `PREPARE_CACHE`, whatever the model itself has in its place."""
    getattr(type(model), PREPARE_CACHE)(model, *args)


def dropped_mask_length(generation_config: GenerationConfig) -> int | None:
    """Width of a padding mask that `generate` dropped because it was all ones; None if it dropped none.

    `generation_config._mask_length`, in 5.23.0; 5.5.0 and 5.17.0 drop no mask.
    """
    return getattr(generation_config, "_mask_length", None)


def forget_cache_length(model: PreTrainedModel) -> None:
    """Let the next static cache of `generate` be as long as it needs, and not as the longest one so far.

    `model._previous_max_cache_length`, in 5.17.0 and 5.23.0; 5.5.0 keeps no such length.
    """
    vars(model).pop("_previous_max_cache_length", None)


# --- tensor parallelism ----------------------------------------------------------------------------------------------


def tensor_parallel_mesh(model: PreTrainedModel) -> "tuple[DeviceMesh | None, int | None]":
    """The mesh of processes that `tp_plan="auto"` split a model over, and into how many parts; None where it did not.

    `model._device_mesh` and `model._tp_size`. Beside other kinds of parallelism the mesh has a dimension "tp".
    """
    return getattr(model, "_device_mesh", None), getattr(model, "_tp_size", None)
