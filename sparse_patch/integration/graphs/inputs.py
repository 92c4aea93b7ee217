"""The arguments of a forward that may be a step."""

import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from sparse_patch.integration.graphs.recording import can_record
from sparse_patch.integration.step import NotAStep

# Tensors that a step may be given, beside the mask. Each step copies them to where the graph reads them.
_READ = ("input_ids", "position_ids", "cache_position")


@dataclass(frozen=True)
class StepInputs:
    """The arguments of one forward of one token for each row.

    Attributes:
        cache: the cache.
        mask: the padding mask, `[B, tokens]`; None without one.
        tensors: the tensors that each step copies, by name.
        others: the other arguments, by name.
    """

    cache: Any
    mask: torch.Tensor | None
    tensors: Mapping[str, torch.Tensor]
    others: Mapping[str, Any]

    @property
    def ids(self) -> torch.Tensor:
        return self.tensors["input_ids"]

    @property
    def form(self) -> Hashable:
        """What must be the same from step to step."""
        tensors = ((name, x.shape, x.dtype, x.device) for name, x in self.tensors.items())
        return tuple(tensors), tuple(self.others.items())


def inputs_of(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> StepInputs | None:
    """The arguments of a forward of one token for each row, with a cache, on a GPU; None for any other forward.

    Raises:
        NotAStep: there is an argument that a step does not know.
    """
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not torch.is_tensor(ids) or ids.ndim != 2 or ids.shape[1] != 1 or not can_record(ids):
        return None
    named = _named(forward, args, kwargs) if args else dict(kwargs)
    cache, mask = named.pop("past_key_values", None), named.pop("attention_mask", None)
    if not isinstance(cache, Cache):
        return None
    if mask is not None and not (torch.is_tensor(mask) and mask.ndim == 2 and mask.device == ids.device):
        raise NotAStep("a mask that is not one of padding")
    tensors = {name: named.pop(name) for name in _READ if torch.is_tensor(named.get(name))}
    for name, value in named.items():
        if not isinstance(value, bool | int | float | str | None):
            raise NotAStep(f"argument {name}")
        if name.startswith("output_") and value:
            raise NotAStep(name)
    if named.get("return_dict") is False:
        raise NotAStep("return_dict=False")
    if named.get("use_cache") is False:
        raise NotAStep("use_cache=False")
    return StepInputs(cache, mask, tensors, named)


def _named(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    names = [name for name in inspect.signature(forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}
