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
    """

    state: Any
    phase: Phase
    call: AttentionCall | None
    plan: SparsePlan | None
    dense: str | None
    keeps_all: bool = True


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
    work: Work = field(init=False)

    def __post_init__(self) -> None:
        self.work = work_of(self.starts, self.length)


def work_of(starts: Sequence[int], length: int, steps: int = 1) -> Work:
    """The dense work of consecutive steps, the first of them with `length` tokens before it."""
    per_row = sum(length + 1 - start for start in starts)
    pairs = steps * per_row + len(starts) * (steps * (steps - 1) // 2)
    return Work(steps * len(starts), pairs, pairs)


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
