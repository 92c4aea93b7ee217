"""The steps of one cache: eager at first, as a CUDA graph as soon as a step is like the one before it.

What a graph relies on is compared before every replay. If anything differs, the step runs eagerly, and the next one
that finds the same again is captured anew. So a graph is never replayed on something else than it was made for.
"""

from threading import Lock
from typing import Any
from weakref import ref

from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from sparse_patch.errors import PatchError
from sparse_patch.integration.graphs.captured import Captured, Forward, capture, position_of, run_step
from sparse_patch.integration.graphs.inputs import StepInputs
from sparse_patch.integration.graphs.model_state import ModelState, torch_state
from sparse_patch.integration.graphs.padding import Padding
from sparse_patch.integration.graphs.stepped_cache import SteppedCache
from sparse_patch.integration.patch import Patch
from sparse_patch.integration.step import NotAStep, Step
from sparse_patch.report import COUNTING

_COMPARING = Lock()


def _state_now(root: PreTrainedModel, patch: Patch) -> ModelState:
    """The state of the model: the same object as long as the model is the same."""
    with _COMPARING:
        known: ModelState | None = patch.model_state
        if known is None or not known.holds():
            known = patch.model_state = ModelState(root)
        return known


class DecodeGraph:
    """The steps of one cache. It is attached to the cache and has no reference to it, so both are freed at once."""

    def __init__(self) -> None:
        self._gave_up: str | None = None
        self._form: Any = None  # what decided the last step that ran eagerly, beside the model
        self._model: ref[ModelState] | None = None  # the model then
        self._padding: Padding | None = None
        self._captured: Captured | None = None

    def __reduce__(self) -> tuple[type["DecodeGraph"], tuple[()]]:
        return DecodeGraph, ()  # a copy of a cache begins anew

    def run(self, forward: Forward, root: PreTrainedModel, patch: Patch, inputs: StepInputs) -> ModelOutput:
        """Run one step.

        Raises:
            NotAStep: the forward cannot be a step. The cache is as it was.
            PatchError: the model was patched or unpatched meanwhile.
        """
        if self._gave_up is not None:
            raise NotAStep(self._gave_up)
        if not patch.reaches_attention:
            raise NotAStep("another attention implementation, set after patch_model")
        settings = torch_state()
        cache = SteppedCache.of(inputs.cache, len(inputs.ids), patch.has_spans)
        padding = self._padding_of(inputs, cache)
        if patch.config.decode_graph == "auto" and not patch.keeps_plans:
            form = settings, inputs.form, cache.capacity, padding.starts, cache.places(), patch.mark
            captured = self._graph_for(form, forward, root, cache, padding, patch, inputs)
            if captured is not None:
                output = captured.replay(cache, inputs)
                with COUNTING:
                    patch.graphs.replays += 1
                return output
        step = Step(position_of(cache, inputs), cache.length, cache.capacity, padding.starts, padding.row_starts)
        try:
            output = run_step(forward, step, cache, padding, inputs, inputs.tensors)
        except Exception as error:
            raise self._give_up(error) from error
        cache.advance()
        return output

    def _graph_for(
        self,
        form: Any,
        forward: Forward,
        root: PreTrainedModel,
        cache: SteppedCache,
        padding: Padding,
        patch: Patch,
        inputs: StepInputs,
    ) -> Captured | None:
        """The graph of this step, captured now if the last step was like it; None if this one has to run eagerly."""
        model = _state_now(root, patch)
        if model.refusal is not None:
            raise NotAStep(model.refusal)
        if form != self._form or self._model is None or self._model() is not model:
            self._captured = None
            self._form, self._model = form, ref(model)
            return None
        if self._captured is not None and not self._captured.serves(cache):
            self._captured = None
            return None
        if self._captured is None and cache.is_worth_a_graph:
            try:
                self._captured = capture(forward, cache, padding, patch, inputs)
            except Exception as error:
                raise self._give_up(error) from error
        return self._captured

    def _give_up(self, error: Exception) -> Exception:
        """Run no more steps with this cache, because one failed."""
        if isinstance(error, PatchError):
            return error
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        self._gave_up = why if isinstance(error, NotAStep) else f"the step failed: {why}"
        return NotAStep(self._gave_up)

    def _padding_of(self, inputs: StepInputs, cache: SteppedCache) -> Padding:
        """The padding of the rows. It is read from the device once; each step compares its mask with that."""
        of_step = inputs.mask, inputs.ids, cache.length, cache.capacity
        if self._padding is None or not self._padding.holds(*of_step):
            self._padding = Padding.of(*of_step)
        return self._padding
