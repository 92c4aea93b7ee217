"""A captured step, and how far it serves."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.utils.generic import ModelOutput

from sparse_patch.integration.graphs.inputs import StepInputs
from sparse_patch.integration.graphs.padding import Padding
from sparse_patch.integration.graphs.recording import Recording
from sparse_patch.integration.graphs.stepped_cache import SteppedCache
from sparse_patch.integration.patch import Patch, state_of
from sparse_patch.integration.step import NotAStep, Step, StepCall, running
from sparse_patch.integration.tally import Tally
from sparse_patch.kernels.inference_mode import ordinary_tensors

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Captured:
    """A captured step.

    Attributes:
        recording: the graph.
        position: where it reads the number of tokens, int64 `[]`.
        tensors: where it reads the tensors of `StepInputs`.
        output: what the forward returned, without the cache.
        tally: what its calls count.
        until: number of tokens before a step from which on a method decides otherwise.
        places_of_state: where the tensors lie that decode methods keep.
        covering: the layers whose methods keep such tensors for all tokens.
    """

    recording: Recording
    position: torch.Tensor
    tensors: Mapping[str, torch.Tensor]
    output: ModelOutput
    tally: Tally
    until: int
    places_of_state: list[list[int]]
    covering: list[int]

    def serves(self, cache: SteppedCache) -> bool:
        """Whether the methods would do the same on the same tensors."""
        return (
            cache.length < self.until
            and self.places_of_state == cache.places_of_state()
            and all(cache.layers[i].covered == cache.length for i in self.covering)
        )

    def replay(self, cache: SteppedCache, inputs: StepInputs) -> ModelOutput:
        """Run the step."""
        for name, tensor in inputs.tensors.items():
            self.tensors[name].copy_(tensor)
        self.position.fill_(cache.length)
        self.recording.replay()
        cache.advance()
        self.tally.replayed(cache.length)
        fields = {key: x.clone() if torch.is_tensor(x) else x for key, x in self.output.items()}
        return type(self.output)(**fields, past_key_values=inputs.cache)


def position_of(cache: SteppedCache, inputs: StepInputs) -> torch.Tensor:
    """The number of tokens in a cache, int64 `[]` on the device."""
    with ordinary_tensors():
        return torch.full((), cache.length, dtype=torch.int64, device=inputs.ids.device)


def run_step(
    forward: Forward,
    step: Step,
    cache: SteppedCache,
    padding: Padding,
    inputs: StepInputs,
    tensors: Mapping[str, torch.Tensor],
) -> ModelOutput:
    """Run the forward as a step; if it fails, leave the cache as it was.

    Raises:
        NotAStep: the forward cannot be a step.
        Exception: what the forward raises.
    """
    others = {**inputs.others, "past_key_values": inputs.cache, "use_cache": True}
    if inputs.mask is not None:
        others["attention_mask"] = padding.mask
    try:
        with running(step, cache.layers):
            output = forward(**tensors, **others)
    except Exception:
        cache.take_back()
        raise
    if not isinstance(output, ModelOutput):
        raise NotAStep(f"a model that returns a {type(output).__name__}")
    return output


def capture(forward: Forward, cache: SteppedCache, padding: Padding, patch: Patch, inputs: StepInputs) -> Captured:
    """Capture a step without running it.

    Raises:
        NotAStep: the forward cannot be a step.
        Exception: the forward cannot be captured.
    """
    begin, device = time.perf_counter(), inputs.ids.device
    states = [state_of(module) for module in patch.attention]
    heads = max(int(state.original_config.num_attention_heads) for state in states)
    position = position_of(cache, inputs)
    with ordinary_tensors():
        tensors = {name: x.clone() for name, x in inputs.tensors.items()}
        totals = torch.zeros(len(states), heads, dtype=torch.int64, device=device)
    calls: list[StepCall] = []
    step = Step(position, cache.length, cache.capacity, padding.starts, padding.row_starts, calls)
    recording = Recording()

    def launched() -> tuple[ModelOutput, Tally]:
        output = run_step(forward, step, cache, padding, inputs, tensors)
        return output, Tally(recording, calls, padding.starts, totals)

    output, tally = recording.record(launched, device)
    covering = [i for i, layer in enumerate(cache.layers) if layer.covered > cache.length]
    cache.take_back()  # nothing ran yet
    until = min((_until(call, cache) for call in calls), default=cache.capacity)
    kept = type(output)(**{key: x for key, x in output.items() if key != "past_key_values"})
    patch.add_graph(tally, time.perf_counter() - begin)
    return Captured(recording, position, tensors, kept, tally, until, cache.places_of_state(), covering)


def _until(call: StepCall, cache: SteppedCache) -> int:
    """The number of tokens before a step from which on the method decides otherwise about a call."""
    method = call.state.methods.get(call.phase)
    if call.call is None or method is None:
        return cache.capacity
    asked = call.call

    def is_dense(tokens: int) -> bool:
        return method.why_dense(replace(asked, known_end=tokens + 1)) is not None

    now, low, high = is_dense(cache.length), cache.length, cache.capacity - 1
    if high <= low or is_dense(high) == now:
        return cache.capacity
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_dense(middle) == now else (low, middle)
    return high
