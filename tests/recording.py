"""A stand-in for CUDA graphs on a CPU: records the operators of PyTorch and runs them again on the same tensors.

Like a CUDA graph, a replay runs no Python of the model, reads its inputs where they were when it was recorded, and
writes its outputs where they were.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
_READ_BY_THE_HOST = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.item")


class HostRead(RuntimeError):
    """An operator that waits for the device, which a CUDA graph cannot have."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        self.launches: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # what lay there before the function
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(_READ_BY_THE_HOST):
            raise HostRead(f"{func} reads from the device")
        if func._schema.is_mutable:
            self._keep(tree_leaves((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        self._made |= _storages(result) - _storages((args, kwargs))
        self.launches.append((func, args, kwargs or {}, result))
        return result

    def _keep(self, values: list[Any]) -> None:
        """Keep the content of tensors that the function did not make."""
        for x in values:
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in {*self._made, *self.before}:
                whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
                self.before[x.untyped_storage().data_ptr()] = whole, whole.clone()


def _storages(tree: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if torch.is_tensor(x)}


class OperatorRecording:
    """See the module's text; the interface is that of `integration.graphs.recording.Recording`."""

    def record(self, function: Callable[[], T], device: torch.device) -> T:
        recorder = _Recorder()
        with recorder:
            result = function()
        self._launches = recorder.launches
        for whole, content in recorder.before.values():
            whole.copy_(content)  # a graph that is captured does not run
        return result

    @torch.inference_mode()  # a graph does not care where its tensors were made
    def replay(self) -> None:
        for func, args, kwargs, made in self._launches:
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
