"""Observe the attention calls of a model, through the hook that sparse methods use."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from transformers import PreTrainedModel

from sparse_patch.call import AttentionCall
from sparse_patch.config import PatchConfig
from sparse_patch.integration.patching import patched
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.methods.base.settings import Method
from sparse_patch.model_shape import ModelShape
from sparse_patch.plans import Dense, Plan


class _Observer(Method):
    """Pass every prefill call to a function; the model stays dense."""

    phases = ("prefill",)
    summary = "looks on"
    paper = "none"

    method: Literal["observer"] = "observer"
    see: Callable[[AttentionCall], None]

    def bind(self, shape: ModelShape) -> BoundMethod:
        return _BoundObserver(self)


class _BoundObserver(BoundMethod):
    settings: _Observer

    def __init__(self, settings: _Observer) -> None:
        self.settings = settings

    def plan(self, call: AttentionCall) -> Plan:
        self.settings.see(call)
        return Dense("observed")


@contextmanager
def observed(model: PreTrainedModel, see: Callable[[AttentionCall], None]) -> Iterator[None]:
    """In a `with` block, call `see` for each prefill call that a sparse method could serve, before it runs densely.

    Layers with a sliding window always stay dense and are not observed. A call does not say which sinks the softmax
    has.

    Raises:
        PatchError: the model is patched already, or cannot be.
    """
    with patched(model, PatchConfig(prefill=_Observer(see=see), on_unsupported="silent", source="observer")):
        yield
