"""Tensors that can be written in place inside and outside `torch.inference_mode`, wherever they were made."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_map


def ordinary_tensors() -> AbstractContextManager[None]:
    """A context whose new tensors can later be written in place, inside and outside `torch.inference_mode`."""
    inside = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return _outside_inference_mode() if inside else nullcontext()


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


class OrdinaryState:
    """Base class of objects that hold such tensors. Copies by `copy`, `pickle` and `torch.load` hold them too."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: tree_map(_ordinary, value) for name, value in state.items()})


def _ordinary(value: Any) -> Any:
    """Copy a tensor made inside `torch.inference_mode` to an ordinary tensor; return anything else as it is."""
    if not (torch.is_tensor(value) and value.is_inference()):
        return value
    with ordinary_tensors():
        copy = value.clone()
    vars(copy).update(vars(value))  # its attributes, such as the mark of a static address
    return copy
