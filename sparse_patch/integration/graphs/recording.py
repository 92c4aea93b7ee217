"""A CUDA graph of a function."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TypeVar

import torch

T = TypeVar("T")
_CAPTURING = Lock()


def can_record(x: torch.Tensor) -> bool:
    """Whether functions of tensors on this device can be recorded."""
    return x.is_cuda


class Recording:
    """What a function launched, to be launched again on the same tensors.

    The recording keeps the memory of what the function made, and nothing else.
    """

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, function: Callable[[], T], device: torch.device) -> T:
        """Record a function without running it; return what it returned: tensors that `replay` fills.

        Raises:
            Exception: what the function raises; and an error of CUDA if it reads from the device.
        """
        self._device = device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with _CAPTURING, torch.cuda.stream(stream), _without_collection():
            self._graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on
            try:
                result = function()
            finally:
                self._graph.capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        return result

    def replay(self) -> None:
        """Run what was recorded, on the current stream of its device."""
        with torch.cuda.device(self._device):
            self._graph.replay()


@contextmanager
def _without_collection() -> Iterator[None]:
    """No garbage collection: it might free another graph, which is not allowed while one is captured."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
