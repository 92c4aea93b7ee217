"""Layers of a KV cache that keep every token, with room for what a decode method keeps beside the keys.

A `DynamicCache` of Transformers copies all its keys and values for every token; a `GrowingLayer` copies the token. A
`FixedLayer` is the static layer, with what that lacks: cropping, and reordering in place. Both keep a decode method's
statistics (`KVState`) in step when the rows of the batch or the end of the text change.

What a layer writes in place are ordinary tensors even if it was filled under `torch.inference_mode`, so a cache can be
used outside of it (`sparse_patch.ordinary`).
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, StaticLayer

from sparse_patch.call import KVState
from sparse_patch.kernels.inference_mode import OrdinaryState, ordinary_tensors
from sparse_patch.kernels.room import SPARE


class GrowingLayer(OrdinaryState, DynamicLayer):
    """A `DynamicLayer` that keeps room behind its last token. For inference: it writes in place.

    Attributes:
        max_length: tokens of prompt and answer together; 0 where that is not known. Nothing stops there.
        kv_state: what a decode method keeps beside the keys.
    """

    _room: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, max_length: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_length = max_length
        self.kv_state = KVState()

    def make_room(self, length: int) -> None:
        """Prompt and answer become so long, if it was known how long."""
        self.max_length = max(self.max_length, length) if self.max_length else 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values `[B, Hkv, S, D]`; all of them, `[B, Hkv, length, D]`, views of what is kept.

        Where gradients are recorded they are copies, as those of a `DynamicLayer`, and inside `torch.compile`, which
        cannot trace where tensors lie.
        """
        recorded = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if recorded or torch.compiler.is_compiling():
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        new = key_states, value_states
        if self._room is None or not all(map(_lies_in, (self.keys, self.values), self._room, new)):
            with ordinary_tensors():
                keys, values = (
                    _with_room(old, states, length, end)
                    for old, states in zip((self.keys, self.values), new, strict=True)
                )
            self._room = keys, values
            self.dtype = keys.dtype
        keys, values = self._room
        keys[..., length:end, :] = key_states
        values[..., length:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def reset(self) -> None:
        self.keys = self.values = None  # Transformers up to 5.17 would zero them, and keep their length
        self.is_initialized = False
        super().reset()
        self._room = None
        self.kv_state.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is negative, as Transformers has it."""
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
    """A `StaticLayer` whose tensors stay where they are as long as the batch has its size, as CUDA graphs need it."""

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        with ordinary_tensors():
            super().__init__(max_cache_len, **kwargs)
        self.kv_state = KVState()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        with ordinary_tensors():
            super().lazy_initialization(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is negative, as Transformers has it.

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
        """Repeat every row of the batch; the tensors become larger ones elsewhere."""
        self._change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch; the tensors become smaller ones elsewhere."""
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
    """The changed tensor where the old one was, if it has its shape still; else marked as one that stays there."""
    changed = change(tensor)
    if changed.shape == tensor.shape:
        return tensor.copy_(changed)
    stays_in_place(changed)
    return changed


def stays_in_place(tensor: torch.Tensor) -> None:
    """Tell CUDA graphs that a tensor stays where it is; a graph that makes it itself need not be told."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)


def _lies_in(kept: torch.Tensor, room: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether what is kept still lies in the room (beam search and the like replace it), and the new tokens fit in."""
    dtype, (rows, _, length, _), (all_rows, _, all_tokens, _) = room.dtype, kept.shape, room.shape
    still = kept.data_ptr() == room.data_ptr() and rows == all_rows and kept.dtype == dtype
    fits = length + new.shape[2] <= all_tokens
    return still and fits and (new.dtype == dtype or torch.promote_types(dtype, new.dtype) == dtype)


def _with_room(old: torch.Tensor, new: torch.Tensor, length: int, end: int) -> torch.Tensor:
    """Room for more than `end` tokens, the first `length` filled, in a dtype that holds old and new ones."""
    dtype = torch.promote_types(old.dtype, new.dtype) if length else new.dtype
    room = new.new_empty((*new.shape[:-2], end + SPARE + end // 8, new.shape[-1]), dtype=dtype)
    if length:
        room[..., :length, :] = old
    return room
