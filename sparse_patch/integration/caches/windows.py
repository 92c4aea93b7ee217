"""Layers of a KV cache that keep a window: the last tokens of a text."""

from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from sparse_patch.integration.caches.layers import RoomLayer
from sparse_patch.integration.step import NotAStep, place_of, room_of
from sparse_patch.kernels.inference_mode import ordinary_tensors


class WindowLayer(RoomLayer, DynamicSlidingWindowLayer):
    """A `DynamicSlidingWindowLayer` that serves steps, of sliding windows and of chunks.

    Outside of steps it does what that layer does. Before a step its tokens move to a room, to places that follow from
    their numbers (`place_of`). The room is the same for all steps. It has places for a window and some more tokens, or
    for all tokens if there will be fewer.
    """

    _end = 0  # the place after the last token, in the room

    def __init__(self, sliding_window: int, max_length: int = 0) -> None:
        super().__init__(max_length, sliding_window=sliding_window)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `DynamicSlidingWindowLayer`; in a step return the whole room, `[B, Hkv, places, D]`."""
        if self.step is not None:
            return self.write(self.step.place_in(self.sliding_window), key_states, value_states)
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def tokens(self) -> int:
        """See `SteppedLayer`."""
        return int(self.cumulative_length)

    @property
    def covered(self) -> int:
        """See `SteppedLayer`."""
        return 0

    def room_for_step(self, batch: int) -> None:
        """See `SteppedLayer`."""
        keys = self.keys
        if keys is None or keys.ndim < 4 or not self.tokens:
            raise NotAStep("a cache without tokens")
        if keys.shape[0] != batch:
            raise NotAStep("a cache of another number of rows")
        if getattr(self, "record_past", False) or keys.shape[2] != self._kept:  # Transformers 5.5 records nothing
            raise NotAStep("a sliding window that tokens may be taken back from")
        places, end = room_of(self.sliding_window), place_of(self.tokens, self.sliding_window)
        if self.tokens < self.max_length:
            places = min(places, self.max_length)
        if not self.is_in_room or (end, places) != (self._end, self._places):
            self._move(end, places)

    @property
    def _kept(self) -> int:
        """Number of tokens that the layer keeps."""
        return min(self.tokens, self.sliding_window - 1)

    @property
    def _places(self) -> int:
        """Number of places of the room."""
        assert self._room is not None, "made by room_for_step"
        return self._room[0].shape[2]

    def _move(self, end: int, places: int) -> None:
        """Move the tokens to the places of the room before `end`; make a room of `places` if there is none for them."""
        assert self.keys is not None and self.values is not None, "see room_for_step"
        kept = self.keys, self.values
        with ordinary_tensors():
            if self._room is None or not all(map(partial(_is_room, places=places), self._room, kept)):
                keys, values = (x.new_empty(*x.shape[:2], places, x.shape[3]) for x in kept)
                self._room = keys, values
            for room, tokens in zip(self._room, kept, strict=True):
                room[:, :, end - self._kept : end] = tokens.clone()  # which may lie in the room themselves
        self._look_back(end)

    def _look_back(self, end: int) -> None:
        """Keep the tokens before a place."""
        self._end = end
        self.look(end - self._kept, end)

    def advance(self) -> None:
        """See `SteppedLayer`."""
        self.cumulative_length += 1
        self._look_back(self._end + 1)

    def take_back(self) -> None:
        """See `SteppedLayer`; a token that was written and not counted is written over."""

    def places_of_state(self) -> list[int]:
        """See `SteppedLayer`; decode methods keep nothing with a window."""
        return []

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `DynamicSlidingWindowLayer`; in a step the number of places of the room, and 0."""
        return super().get_mask_sizes(query_length) if self.step is None else (self._places, 0)


def _is_room(room: torch.Tensor, tokens: torch.Tensor, places: int) -> bool:
    """Whether a tensor is a room of so many places for keys or values like these."""
    rows, heads, _, dim = tokens.shape
    return room.shape == (rows, heads, places, dim) and (room.dtype, room.device) == (tokens.dtype, tokens.device)
