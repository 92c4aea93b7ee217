"""One decode step on tensors that stay in place, as a CUDA graph of the step requires.

In such a step the number of tokens is on the device. The layers of the cache write the new token there, and hand their
whole room to attention, like the layers of a static cache. The same step runs eagerly or as a graph, with the same
result (`integration.graphs`).
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sparse_patch.call import AttentionCall, Phase
from sparse_patch.kernels.room import SPARE
from sparse_patch.plans import SparsePlan
from sparse_patch.report import Work


class NotAStep(Exception):
    """A forward cannot run as a step; the text is the reason. Nothing that the step wrote has to be undone."""


@dataclass(frozen=True)
class StepCall:
    """One attention call of a step that is being captured: what to count whenever the graph runs.

    Attributes:
        state: the `LayerState` of the attention module.
        phase: the phase of the call.
        call: what the method was asked; None if it was not asked.
        plan: the plan that was executed; None if the call was dense.
        dense: why the call was dense; None if it was not.
        keeps_all: whether the cache has every key.
        window: width of the window of a local layer; None in full layers.
    """

    state: Any
    phase: Phase
    call: AttentionCall | None
    plan: SparsePlan | None
    dense: str | None
    keeps_all: bool = True
    window: int | None = None


@dataclass(frozen=True)
class Reach:
    """Which keys the token of a step reads, of those that a layer of the cache hands over.

    Attributes:
        starts: first key of each row, int64 `[B]`; None if it is 0 for every row.
        end: number of keys up to the token, int64 `[]`.
        length: the same number, on the host.
    """

    starts: torch.Tensor | None
    end: torch.Tensor
    length: int


@dataclass(eq=False)
class Step:
    """One step with a cache.

    Attributes:
        position: tokens that the cache had before the step, int64 `[]` on the device.
        length: the same number, on the host.
        capacity: tokens that the layers which keep everything have room for.
        starts: first real token of each row of the batch, on the host.
        row_starts: the same, int64 `[B]` on the device; None if no row is padded.
        captured: the calls of the step, if it is being captured; else None.
    """

    position: torch.Tensor
    length: int
    capacity: int
    starts: Sequence[int]
    row_starts: torch.Tensor | None
    captured: list[StepCall] | None = None
    _places: dict[int, torch.Tensor] = field(default_factory=dict, init=False)

    def work(self, window: int | None) -> Work:
        """The work of a dense call of the step."""
        return work_of(self.starts, self.length, window=window)

    def place_in(self, window: int) -> torch.Tensor:
        """`place_of` the token of the step, int64 `[]` on the device."""
        if window not in self._places:
            kept = window - 1
            self._places[window] = torch.minimum(self.position, kept + (self.position - kept) % SPARE)
        return self._places[window]

    def reach(self, window: int | None, is_chunked: bool = False) -> Reach:
        """What the token reads in layers that keep everything, or in layers that keep a window in a room.

        Args:
            window: width of the window; None in layers that keep everything.
            is_chunked: whether the window is a chunk: rows are cut into chunks, and a token reads only its own.
        """
        if window is None:
            return Reach(self.row_starts, self.position + 1, self.length + 1)
        place, rows = self.place_in(window), len(self.starts)
        before = self.position.expand(rows) if self.row_starts is None else self.position - self.row_starts
        back = before % window if is_chunked else before.clamp(max=window - 1)
        return Reach(place - back, place + 1, place_of(self.length, window) + 1)


def room_of(window: int) -> int:
    """Number of places of the room in which a layer keeps a window of a text of any length."""
    return window - 1 + SPARE


def place_of(token: int, window: int) -> int:
    """Where in its room a layer that keeps a window has the token with this number, counted from 0 and with padding.

    The first `window - 1` tokens lie at their numbers, the next ones after them. When the room is full, the last
    `window - 1` tokens move to its front, and so on. So the place follows from the number, also inside a graph.
    """
    kept = window - 1
    return min(token, kept + (token - kept) % SPARE)


def work_of(starts: Sequence[int], length: int, steps: int = 1, window: int | None = None) -> Work:
    """The dense work of consecutive steps, the first of them with `length` tokens before it; see `LazyMask.work`."""
    rows, first = len(starts), sum(length + 1 - start for start in starts)
    causal = _sum_of(first, rows, steps)
    attended = causal
    if window is not None:
        growing = min(max(-(-(rows * window - first) // rows), 0), steps)  # steps that read less than all windows
        attended = _sum_of(first, rows, growing) + (steps - growing) * rows * window
    return Work(steps * rows, causal, attended)


def _sum_of(first: int, more: int, number: int) -> int:
    """The sum of `number` numbers that begin with `first` and grow by `more`."""
    return number * first + more * (number * (number - 1) // 2)


class SteppedLayer(Protocol):
    """A layer of a cache that steps can use.

    Attributes:
        step: the step that is running; None outside of steps.
        max_length: tokens of prompt and answer together; 0 if not known.
    """

    step: Step | None
    max_length: int

    @property
    def tokens(self) -> int:
        """Tokens so far, known on the host."""
        ...

    @property
    def covered(self) -> int:
        """Tokens that the tensors of a decode method cover; 0 without such tensors."""
        ...

    def room_for_step(self, batch: int) -> int | None:
        """Make room for one more token; return how many tokens there is room for, or None if it does not matter.

        Raises:
            NotAStep: the layer cannot serve a step of `batch` rows now.
        """
        ...

    def place(self) -> Hashable:
        """Where the layer keeps its tokens, and for which length it was made."""
        ...

    def places_of_state(self) -> list[int]:
        """Where the tensors lie that decode methods keep with the keys."""
        ...

    def advance(self) -> None:
        """Count the token that a step wrote."""
        ...

    def take_back(self) -> None:
        """Undo what a step left that failed, or that was only captured."""
        ...


_RUNNING: ContextVar[Step | None] = ContextVar("step", default=None)


def running_step() -> Step | None:
    """The step that runs in this thread; None if there is none."""
    return None if torch.compiler.is_compiling() else _RUNNING.get()


@contextmanager
def running(step: Step, layers: Sequence[SteppedLayer]) -> Iterator[None]:
    """Make the forward in a `with` block a step with these layers."""
    token = _RUNNING.set(step)
    for layer in layers:
        layer.step = step
    try:
        yield
    finally:
        _RUNNING.reset(token)
        for layer in layers:
            layer.step = None
