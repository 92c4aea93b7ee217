"""Layers of a KV cache that keep every token, with room for a decode method's state.

A `DynamicCache` of Transformers copies all its keys and values for every token; a `GrowingLayer` copies only the token.
A `FixedLayer` is a static layer that can also be cropped, and reordered in place. Both keep a decode method's
statistics (`KVState`) in step when the rows of the batch or the end of the text change.

The tensors that a layer writes in place are ordinary tensors even if the layer was filled under
`torch.inference_mode`, so a cache can be used outside of it (`kernels.inference_mode`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

from sparse_patch.call import KVState
from sparse_patch.integration.step import NotAStep, Step
from sparse_patch.kernels.inference_mode import OrdinaryState, ordinary_tensors
from sparse_patch.kernels.room import SPARE


class RoomLayer(OrdinaryState, DynamicLayer):
    """A `DynamicLayer` whose steps write the token into a room, tensors that stay in their place.

    Attributes:
        max_length: tokens of prompt and answer together; 0 if not known. The layer can grow beyond it.
        step: see `SteppedLayer`.
    """

    step: Step | None = None
    _room: tuple[torch.Tensor, torch.Tensor] | None = None
    _views: tuple[torch.Tensor, torch.Tensor] | None = None  # `keys` and `values`, if they lie in the room

    def __init__(self, max_length: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_length = max_length

    def make_room(self, length: int) -> None:
        """Raise `max_length` to `length`, unless `max_length` is not known."""
        self.max_length = max(self.max_length, length) if self.max_length else 0

    @property
    def is_in_room(self) -> bool:
        """Whether the tokens lie in the room; they do not if something replaced them, such as beam search."""
        views = self._views
        return views is not None and views[0] is self.keys and views[1] is self.values

    def look(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Let `keys` and `values` be these places of the room."""
        assert self._room is not None, "made by room_for_step"
        keys, values = self._room
        self.keys, self.values = self._views = keys.narrow(2, begin, end - begin), values.narrow(2, begin, end - begin)
        return self._views

    def place(self) -> tuple[Any, ...]:
        """See `SteppedLayer`."""
        assert self._room is not None, "made by room_for_step"
        keys, values = self._room
        return keys.data_ptr(), values.data_ptr(), keys.dtype, keys.shape[0], self.max_length

    def write(self, place: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values of one token to a place, int64 `[]`; return the whole room."""
        assert self._room is not None, "made by room_for_step"
        for room, new in zip(self._room, states, strict=True):
            room.index_copy_(2, place.reshape(1), new)
        return self._room

    def get_seq_length(self) -> Any:
        """Number of tokens; in a step, int64 `[]` on the device."""
        return super().get_seq_length() if self.step is None else self.step.position

    def reset(self) -> None:
        self.keys = self.values = None  # Transformers up to 5.17 would zero them and keep their length
        self.is_initialized = False
        super().reset()
        self._room = self._views = None


class GrowingLayer(RoomLayer):
    """A `DynamicLayer` that keeps room after its last token. It is for inference, because it writes in place.

    Attributes:
        kv_state: what a decode method keeps with the keys.
    """

    def __init__(self, max_length: int = 0, **kwargs: Any) -> None:
        super().__init__(max_length, **kwargs)
        self.kv_state = KVState()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values `[B, Hkv, S, D]`; return all of them, `[B, Hkv, length, D]`, as views of what is kept.

        They are copies, like those of a `DynamicLayer`, if gradients are recorded, and inside `torch.compile`, which
        cannot trace where tensors lie.
        """
        if self.step is not None:
            return self.write(self.step.position, key_states, value_states)
        recorded = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if recorded or torch.compiler.is_compiling():
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        length, added = self.tokens, key_states.shape[2]
        end = length + added
        room = self._room if self._has_room(key_states, value_states, end) else None
        keys, values = room or self._reserve(key_states, value_states, length, end)
        keys.narrow(2, length, added).copy_(key_states)
        values.narrow(2, length, added).copy_(value_states)
        return self.look(0, end)

    def _has_room(self, new_keys: torch.Tensor, new_values: torch.Tensor, end: int) -> bool:
        """Whether nothing but this class changed the tensors, and `end` tokens of these dtypes fit."""
        room = self._room
        if room is None or not self.is_in_room:
            return False
        fits = end <= room[0].shape[2] and len(new_keys) == len(room[0])
        return fits and new_keys.dtype == room[0].dtype and new_values.dtype == room[1].dtype

    def _reserve(
        self, new_keys: torch.Tensor, new_values: torch.Tensor, length: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for `end` tokens, of which the first `length` are there, in dtypes that also hold the new ones."""
        assert self.keys is not None and self.values is not None
        old, new = (self.keys, self.values), (new_keys, new_values)
        if self._room is None or not all(map(partial(_lies_in, end=end), old, self._room, new)):
            size = end + SPARE + end // 8
            if end <= self.max_length:
                size = min(size, self.max_length)
            with ordinary_tensors():
                keys, values = (_with_room(kept, added, length, size) for kept, added in zip(old, new, strict=True))
            self._room = keys, values
            self.dtype = keys.dtype
        return self._room

    @property
    def tokens(self) -> int:
        """See `SteppedLayer`."""
        return 0 if self.keys is None or self.keys.ndim < 4 else self.keys.shape[2]  # `[0]` before the first token

    @property
    def covered(self) -> int:
        """See `SteppedLayer`."""
        return self.kv_state.covered

    def room_for_step(self, batch: int) -> int:
        """See `SteppedLayer`."""
        keys, values = self.keys, self.values
        if keys is None or values is None or keys.ndim < 4:
            raise NotAStep("a cache without tokens")
        if self.kv_state.at_rest:
            raise NotAStep("cache correction")
        rows, _, length, _ = keys.shape
        if rows != batch or not length:
            raise NotAStep("a cache of another number of rows, or without tokens")
        room = self._room
        if room is None or not self.is_in_room or length >= room[0].shape[2]:
            room = self._reserve(keys, values, length, length + 1)
        return room[0].shape[2]

    def places_of_state(self) -> list[int]:
        """See `SteppedLayer`."""
        return self.kv_state.places()

    def advance(self) -> None:
        """See `SteppedLayer`."""
        length = self.tokens
        self.look(0, length + 1)
        if self.kv_state.covered == length:
            self.kv_state.covered += 1

    def take_back(self) -> None:
        """See `SteppedLayer`. The tensors of a decode method do not cover the token of the step."""
        self.kv_state.covered = min(self.kv_state.covered, self.tokens)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys of the mask, and its offset; in a step, of all that there is room for."""
        return super().get_mask_sizes(query_length) if self.step is None else (self.step.capacity, 0)

    def reset(self) -> None:
        super().reset()
        self.kv_state.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is negative, as in Transformers."""
        super().crop(tokens_to_remove)
        self.kv_state.covered = min(self.kv_state.covered, self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change_memory(selected(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_memory(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_memory(lambda tensor: tensor[indices])

    def _change_memory(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with ordinary_tensors():
            self.kv_state.change_rows(change)


class FixedLayer(OrdinaryState, StaticLayer):
    """A `StaticLayer` whose tensors stay in place as long as the batch size is the same, as CUDA graphs require."""

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        with ordinary_tensors():
            super().__init__(max_cache_len, **kwargs)
        self.kv_state = KVState()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        with ordinary_tensors():
            super().lazy_initialization(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is negative, as in Transformers.

        Raises:
            ValueError: the number is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        if self.is_initialized:
            self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._change_rows(selected(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch; the tensors are replaced by larger ones."""
        self._change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch; the tensors are replaced by smaller ones."""
        self._change_rows(lambda tensor: tensor[indices])

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not self.is_initialized:
            return
        assert self.keys is not None and self.values is not None
        with ordinary_tensors():
            self.keys, self.values = in_place(self.keys, change), in_place(self.values, change)
            self.kv_state.change_rows(lambda tensor: in_place(tensor, change))
        self.batch_size = len(self.keys)


def selected(rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_select(0, rows.to(tensor.device))


def in_place(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Change a tensor in place if its shape stays the same; else return the changed tensor, marked to stay in place."""
    changed = change(tensor)
    if changed.shape == tensor.shape:
        return tensor.copy_(changed)
    stays_in_place(changed)
    return changed


def stays_in_place(tensor: torch.Tensor) -> None:
    """Tell CUDA graphs that a tensor stays in place. A graph that makes the tensor itself need not be told."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)


def _lies_in(kept: torch.Tensor, room: torch.Tensor, new: torch.Tensor, end: int) -> bool:
    """Whether the kept tensor is still a view of the room (beam search, for one, replaces it), and `end` tokens fit."""
    dtype, rows, (all_rows, _, all_tokens, _) = room.dtype, len(kept), room.shape
    still = kept.data_ptr() == room.data_ptr() and rows == all_rows and kept.dtype == dtype
    fits = end <= all_tokens
    return still and fits and (new.dtype == dtype or torch.promote_types(dtype, new.dtype) == dtype)


def _with_room(old: torch.Tensor, new: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """Room for `size` tokens, with the first `length` filled, in a dtype that can hold old and new ones."""
    dtype = torch.promote_types(old.dtype, new.dtype) if length else new.dtype
    room = new.new_empty((*new.shape[:-2], size, new.shape[-1]), dtype=dtype)
    if length:
        room[..., :length, :] = old
    return room
