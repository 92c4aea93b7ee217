"""A cache as its steps use it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import cache_utils
from transformers.cache_utils import DynamicCache

from sparse_patch.integration.caches.layers import GrowingLayer
from sparse_patch.integration.caches.rings import RingLayer
from sparse_patch.integration.caches.windows import WindowLayer
from sparse_patch.integration.step import NotAStep, SteppedLayer
from sparse_patch.kernels.room import SPARE

_FEW = 6  # tokens that are not worth a graph
_SERVED: set[type] = {GrowingLayer, RingLayer, WindowLayer}
# Stands in for layers of a model that read the keys of other layers; Transformers 5.17 has no such class.
_WITHOUT_KEYS: type | None = getattr(cache_utils, "DummyLayer", None)


@dataclass(frozen=True)
class SteppedCache:
    """The layers of a cache, with room for one more token.

    Attributes:
        layers: the layers that keep keys.
        length: tokens that they have.
        capacity: tokens that they have room for.
    """

    layers: Sequence[SteppedLayer]
    length: int
    capacity: int

    @classmethod
    def of(cls, cache: Any, batch: int, with_spans: bool) -> "SteppedCache":
        """Make room for one token of each of `batch` rows.

        Args:
            cache: the cache of a forward.
            batch: number of rows.
            with_spans: whether a decode method has spans, which follow from the length that a cache is made for.

        Raises:
            NotAStep: a layer cannot serve steps, or they have different numbers of tokens.
        """
        if type(cache) is not DynamicCache:
            raise NotAStep(f"a cache of type {type(cache).__name__}")
        layers: list[Any] = [layer for layer in cache.layers if type(layer) is not _WITHOUT_KEYS]
        if others := set(map(type, layers)) - _SERVED:
            raise NotAStep(f"a cache with layers of type {', '.join(sorted(other.__name__ for other in others))}")
        if with_spans and not all(layer.max_length for layer in layers):
            raise NotAStep("spans of a cache that does not know how long the text becomes")
        rooms = {layer.room_for_step(batch) for layer in layers} - {None}
        lengths = {layer.tokens for layer in layers}
        if len(rooms) > 1 or len(lengths) != 1:
            raise NotAStep("layers of different lengths")
        length = lengths.pop()
        return cls(layers, length, rooms.pop() if rooms else _capacity(layers, length))

    @property
    def is_worth_a_graph(self) -> bool:
        """Whether enough tokens follow, as far as the cache knows."""
        return any(not layer.max_length or layer.max_length - self.length > _FEW for layer in self.layers)

    def places(self) -> list[Any]:
        """Where the tokens lie, and the lengths that the layers were made for."""
        return [layer.place() for layer in self.layers]

    def places_of_state(self) -> list[list[int]]:
        """Where the tensors lie that decode methods keep."""
        return [layer.places_of_state() for layer in self.layers]

    def advance(self) -> None:
        """Count the token that a step wrote."""
        for layer in self.layers:
            layer.advance()

    def take_back(self) -> None:
        """Undo what a step left that failed, or that was only captured."""
        for layer in self.layers:
            layer.take_back()


def _capacity(layers: Sequence[SteppedLayer], length: int) -> int:
    """The capacity of layers with room for any number of tokens. It changes rarely, because graphs depend on it."""
    known = max(layer.max_length for layer in layers)
    return known if length < known else max(SPARE, 1 << length.bit_length())
