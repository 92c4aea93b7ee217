"""A CUDA graph of a function."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import TypeVar

import torch

T = TypeVar("T")
_CAPTURING = Lock()


class _Turns:
    """What the graphs of a device share, so that they run one after the other.

    All are captured on one stream, whose workspace for matrix products they use: with a stream of its own, each graph
    would need 33 MB more. So graphs that are replayed on several streams must take turns.
    """

    def __init__(self, device: torch.device) -> None:
        self.capturing = torch.cuda.Stream(device)
        self._lock, self._done = Lock(), torch.cuda.Event()
        self._stream: torch.cuda.Stream | None = None

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Replay a graph on the current stream, after those of other streams."""
        with self._lock:
            stream = torch.cuda.current_stream()
            if self._stream not in (None, stream):
                stream.wait_event(self._done)
            graph.replay()
            self._done.record(stream)
            self._stream = stream


@cache
def _turns(device: torch.device) -> _Turns:
    with torch.cuda.device(device):
        return _Turns(device)


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
        stream = _turns(device).capturing
        with _CAPTURING:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream), _without_collection():
                self._graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on
                try:
                    return function()
                finally:
                    self._graph.capture_end()

    def replay(self) -> None:
        """Run what was recorded, on the current stream of its device."""
        with torch.cuda.device(self._device):
            _turns(self._device).replay(self._graph)


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
