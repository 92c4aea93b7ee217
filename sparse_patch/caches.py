"""KV caches. A cache of Transformers copies all its keys and values for every token; this one copies the token."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

_SPARE = 256  # tokens of room beyond what is asked for


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that keeps room behind its last token. For inference: it writes in place."""

    _room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values `[B, Hkv, S, D]`; all of them, `[B, Hkv, length, D]`, views of what is kept."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self._room is None or not _lies_in(self.keys, self._room[0], end):
            self._room = (
                _with_room(self.keys, key_states, length, end),
                _with_room(self.values, value_states, length, end),
            )
        keys, values = self._room
        keys[..., length:end, :] = key_states
        values[..., length:end, :] = value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """The cache that `generate` makes for a model, with growing layers in place of those that copy."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _lies_in(keys: torch.Tensor, room: torch.Tensor, end: int) -> bool:
    """Whether the keys still lie in the room (beam search and the like replace them), and `end` tokens do too."""
    return room.shape[-2] >= end and keys.data_ptr() == room.data_ptr() and len(keys) == len(room)


def _with_room(old: torch.Tensor, new: torch.Tensor, length: int, end: int) -> torch.Tensor:
    room = new.new_empty((*new.shape[:-2], end + _SPARE + end // 8, new.shape[-1]))
    if length:
        room[..., :length, :] = old
    return room
