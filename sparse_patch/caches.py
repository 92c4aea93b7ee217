"""KV caches that sparse decode pays on, as layers of Transformers' own `DynamicCache` and `StaticCache`.

A `DynamicCache` copies all its keys and values for every token; a `GrowingLayer` copies the token. A `FixedLayer` is
the static layer, with what that lacks: cropping, and reordering in place. Both have room for what a decode method
keeps beside the keys (`LayerMemory`) and keep it in step when the rows of the batch or the end of the text change.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, StaticLayer

from sparse_patch.memory import LayerMemory

_SPARE = 256  # tokens of room beyond what is asked for


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that keeps room behind its last token. For inference: it writes in place."""

    _room: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.memory = LayerMemory()

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

    def reset(self) -> None:
        super().reset()
        self._room = None
        self.memory.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is negative, as Transformers has it."""
        super().crop(tokens_to_remove)
        self.memory.covered = min(self.memory.covered, self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.memory.change_rows(_selected(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.memory.change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.memory.change_rows(lambda tensor: tensor[indices])


class FixedLayer(StaticLayer):
    """A `StaticLayer` whose tensors stay where they are as long as the batch has its size, as CUDA graphs need it."""

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__(max_cache_len, **kwargs)
        self.memory = LayerMemory()

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
        self._change_rows(_selected(beam_idx))

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
        self.keys, self.values = _in_place(self.keys, change), _in_place(self.values, change)
        self.batch_size = len(self.keys)
        self.memory.change_rows(lambda tensor: _in_place(tensor, change))


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """The cache that `generate` makes for a model, with growing layers in place of those that copy."""
    cache = DynamicCache(config=config)
    adopt(cache)
    return cache


def adopt(cache: Cache) -> None:
    """Give a new cache of Transformers our layers; layers of other kinds, such as sliding windows, stay as they are."""
    if not getattr(cache, "offloading", False):
        cache.layers = [_ours(layer) for layer in cache.layers]


def memory_of(cache: Any, layer: int) -> LayerMemory | None:
    """The memory of one layer of a cache; None for a cache that has no room for it."""
    layers = getattr(cache, "layers", ())
    memory = getattr(layers[layer], "memory", None) if layer < len(layers) else None
    return memory if isinstance(memory, LayerMemory) else None


def copies(cache: Any, layer: int) -> bool:
    """Whether a layer of a cache copies all its keys for every token."""
    layers = getattr(cache, "layers", ())
    return layer < len(layers) and type(layers[layer]) is DynamicLayer


def _ours(layer: Any) -> Any:
    if layer.is_initialized:
        return layer
    if type(layer) is DynamicLayer:
        return GrowingLayer()
    return FixedLayer(layer.max_cache_len) if type(layer) is StaticLayer else layer


def _selected(rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_select(0, rows.to(tensor.device))


def _in_place(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The changed tensor where the old one was, if it has its shape still; else marked as one that stays there."""
    changed = change(tensor)
    if changed.shape == tensor.shape:
        return tensor.copy_(changed)
    torch._dynamo.mark_static_address(changed)
    return changed


def _lies_in(keys: torch.Tensor, room: torch.Tensor, end: int) -> bool:
    """Whether the keys still lie in the room (beam search and the like replace them), and `end` tokens do too."""
    return room.shape[-2] >= end and keys.data_ptr() == room.data_ptr() and len(keys) == len(room)


def _with_room(old: torch.Tensor, new: torch.Tensor, length: int, end: int) -> torch.Tensor:
    room = new.new_empty((*new.shape[:-2], end + _SPARE + end // 8, new.shape[-1]))
    if length:
        room[..., :length, :] = old
    return room
