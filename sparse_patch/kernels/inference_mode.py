"""Tensors that can be written in place inside `torch.inference_mode` and outside, whoever made them where."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_map


def ordinary_tensors() -> AbstractContextManager[None]:
    """In a `with` block new tensors can be written in place later on, inside `torch.inference_mode` and outside."""
    inside = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return _outside_inference_mode() if inside else nullcontext()


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


class OrdinaryState:
    """A base of what keeps such tensors: its copies have them too, those of `copy`, `pickle` and `torch.load`."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: tree_map(_ordinary, value) for name, value in state.items()})


def _ordinary(value: Any) -> Any:
    """A tensor that was made inside `torch.inference_mode` as one of outside; anything else as it is."""
    if not (torch.is_tensor(value) and value.is_inference()):
        return value
    with ordinary_tensors():
        copy = value.clone()
    vars(copy).update(vars(value))  # what marks it as one that stays where it is
    return copy
