"""KV caches that sparse decode pays on, as layers of Transformers' own `DynamicCache` and `StaticCache`.

A `RingLayer` keeps what the spans of a layer's heads have, and forgets the rest.

A `DynamicCache` copies all its keys and values for every token; a `GrowingLayer` copies the token. A `FixedLayer` is
the static layer, with what that lacks: cropping, and reordering in place. Both have room for what a decode method
keeps beside the keys (`LayerMemory`) and keep it in step when the rows of the batch or the end of the text change.

What a layer writes in place are ordinary tensors even if it was filled under `torch.inference_mode`, so a cache can be
used outside of it (`ordinary_tensors`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.memory import LayerMemory
from sparse_patch.ops import span_ring
from sparse_patch.ops.span_ring import Ring, RingLayout
from sparse_patch.plans import Window
from sparse_patch.precision import as_autocast

# Sinks and windows of a layer's KV heads, of rows that become so long (tokens) and of so many heads.
SpansOf = Callable[[int, int], tuple[Sequence[int], Sequence[Window]]]
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
        """Append keys and values `[B, Hkv, S, D]`; all of them, `[B, Hkv, length, D]`, views of what is kept.

        Where gradients are recorded they are copies, as those of a `DynamicLayer`.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
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
        self.memory.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is negative, as Transformers has it."""
        super().crop(tokens_to_remove)
        self.memory.covered = min(self.memory.covered, self.get_seq_length())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change_memory(_selected(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_memory(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_memory(lambda tensor: tensor[indices])

    def _change_memory(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with ordinary_tensors():
            self.memory.change_rows(change)


class FixedLayer(StaticLayer):
    """A `StaticLayer` whose tensors stay where they are as long as the batch has its size, as CUDA graphs need it."""

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        with ordinary_tensors():
            super().__init__(max_cache_len, **kwargs)
        self.memory = LayerMemory()

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
        with ordinary_tensors():
            self.keys, self.values = _in_place(self.keys, change), _in_place(self.values, change)
            self.memory.change_rows(lambda tensor: _in_place(tensor, change))
        self.batch_size = len(self.keys)


class RingLayer(CacheLayerMixin):
    """A layer that keeps of each KV head the first tokens of a row and a ring of its last ones: what its span has.

    `update` hands back the keys and values of the forward alone. The hook attends to them and to the ring and writes
    them (`attend`; after a forward with nothing before it, `write`), so a ring serves patched models only: each forward
    is announced by `expect`. Nothing else keeps keys or values: what no span has any more is gone, and what needs it is
    refused. A first forward that a ring cannot serve has lost nothing yet: `keeping_all` is the layer to go on with.

    The spans are those of a length. A text that becomes longer makes the ring larger where a head's span is the whole
    length: such heads then have their spans at the new length, the others the ones that they had.

    Attributes:
        keys: `[B, slots, D]`, of all heads one after the other; see `RingLayout`.
        values: `[B, slots, Dv]`.
        max_length: the length, tokens of prompt and answer together.
        seen: tokens until now, padding included; see `get_seq_length`.
        is_empty: whether there are none, for the host to know.
        layout: which slot keeps what; None before the first forward.
    """

    is_sliding = False
    is_croppable = False
    is_compileable = False

    def __init__(self, spans: SpansOf, max_length: int) -> None:
        super().__init__()
        self.spans, self.max_length = spans, max_length
        self.seen: Any = 0
        self.is_empty = True
        self.layout: RingLayout | None = None
        self._expected = False
        self._unwritten: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.layout = self._layout(key_states.shape[1])
        keys, values = as_autocast(key_states, value_states)  # as the hook attends to them
        with ordinary_tensors():
            ring = Ring.empty(self.layout, keys, values)
        self.keys, self.values = ring.k, ring.v
        self.dtype, self.device = ring.k.dtype, ring.k.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same keys and values `[B, Hkv, S, D]`, for the hook to attend to and to write.

        Raises:
            UnsupportedCallError: no patched attention module announced the forward, or the keys of the forward before
                were never written.
        """
        if not self._expected or self._unwritten is not None:
            raise UnsupportedCallError(
                "a span cache serves the model that it was made for while it is patched, one forward at a time; "
                "start again with a new cache"
            )
        self._outgrow(key_states.shape[-2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._expected, self._unwritten = False, (key_states, value_states)
        return key_states, value_states

    def expect(self) -> None:
        """A patched attention module is about to `update`."""
        self._expected = True

    @property
    def is_left_behind(self) -> bool:
        """Whether the first forward went by without the hook: its keys are still those that `update` was given."""
        return self.is_empty and self._unwritten is not None

    def hands_over(self, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether keys and values are the very ones of `update`, not made of them: only those can be written."""
        return self._unwritten is not None and k is self._unwritten[0] and v is self._unwritten[1]

    def keeping_all(self) -> "GrowingLayer | FixedLayer":
        """A layer that keeps every token, to take the place of a ring that has forgotten nothing yet."""
        layer = self._new_keeping_all()
        if self._unwritten is not None:
            layer.update(*self._unwritten)
        return layer

    def _new_keeping_all(self) -> "GrowingLayer | FixedLayer":
        return GrowingLayer()

    def attend(self, call: AttentionCall, before: torch.Tensor, backend: str) -> torch.Tensor:
        """Attention to the ring and to the forward's own keys, and their writing: the output `[B, Hq, Sq, Dv]`.

        Args:
            call: the forward, with its own keys alone.
            before: see `span_ring.tokens_before`.
            backend: one that serves the call.
        """
        if call.q.shape[2] == 1:
            self.write(call.k, call.v, before, backend)
            return span_ring.attend(call, self._ring, before, backend)[0]
        output, _ = span_ring.attend(call, self._ring, before, backend)
        self.write(call.k, call.v, before, backend)
        return output

    @torch.no_grad()
    def write(self, k: torch.Tensor, v: torch.Tensor, before: torch.Tensor, backend: str) -> None:
        """Keep what the spans of later tokens have of a forward's keys and values; see `span_ring.write`."""
        span_ring.write(self._ring, k, v, before, backend)
        self.seen += k.shape[2]  # of a static cache in place
        self.is_empty, self._unwritten = False, None

    def take_back(self) -> None:
        """Undo an `update` that nothing was written after."""
        self._unwritten = None

    def make_room(self, length: int) -> None:
        """Be the ring of rows that become so long; not of shorter ones than before."""
        if length <= self.max_length:
            return
        self.max_length = length
        if self.layout is None or None not in self.layout.windows:
            return
        assert self.keys is not None and self.values is not None
        old, self.layout = self.layout, self._layout(len(self.layout.sinks), self.layout)
        with ordinary_tensors():
            self.keys, self.values = (_moved(kept, old, self.layout) for kept in (self.keys, self.values))

    def get_seq_length(self) -> Any:
        """Tokens seen, not those kept: positions follow from it."""
        if self.is_empty and self._unwritten is not None:  # nothing wrote the first forward, see `is_left_behind`
            return self.seen + self._unwritten[0].shape[-2]
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys of the mask and its offset; the mask describes all tokens, kept or not."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.max_length

    get_max_cache_shape = get_max_length  # the name before Transformers 5.17

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, but for no tokens.

        Raises:
            UnsupportedCallError: tokens would have to be taken back.
        """
        if tokens_to_remove:
            raise UnsupportedCallError(
                "a span cache cannot take tokens back (crop), because those that they replaced are gone; "
                "pass past_key_values=growing_cache(model.config)"
            )

    def reset(self) -> None:
        self.keys = self.values = self.layout = self._unwritten = None
        self.is_initialized = False
        self.is_empty, self.seen = True, 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        self._change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        self._change_rows(lambda tensor: tensor[indices])

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.keys is not None and self.values is not None:
            with ordinary_tensors():
                self.keys, self.values = change(self.keys), change(self.values)

    def _outgrow(self, tokens: int) -> None:
        """Make room for so many more tokens, and some, where a head has to keep them all."""
        end = self.seen + tokens
        if end > self.max_length and (self.layout is None or None in self.layout.windows):
            self.make_room(end + _SPARE + end // 8)

    @property
    def _ring(self) -> Ring:
        assert self.layout is not None and self.keys is not None and self.values is not None
        return Ring(self.layout, self.keys, self.values)

    def _layout(self, heads: int, before: RingLayout | None = None) -> RingLayout:
        """The layout for rows of `max_length`; of the heads before, only those without an end get new spans."""
        try:
            sinks, windows = self.spans(self.max_length, heads)
        except ValueError as error:
            raise UnsupportedCallError(f"{error}; pass past_key_values=growing_cache(model.config)") from None
        if before is not None:
            old, new = zip(before.sinks, before.windows, strict=True), zip(sinks, windows, strict=True)
            kept = [now if was[1] is None else was for was, now in zip(old, new, strict=True)]
            sinks, windows = zip(*kept, strict=True)
        return RingLayout.of(sinks, windows, self.max_length)


class FixedRingLayer(RingLayer):
    """The ring of a static cache: its tensors stay where they are, its length is fixed, and its steps compile.

    Tokens are counted on the device, int64 `[]`. Beyond `max_length` heads that keep everything forget the oldest.
    """

    is_compileable = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        with ordinary_tensors():
            self.seen = torch.zeros((), dtype=torch.int64, device=self.device)
        for tensor in (self.keys, self.values, self.seen):
            torch._dynamo.mark_static_address(tensor)
        span_ring.prepare(self._ring)

    def make_room(self, length: int) -> None:
        """Nothing: a graph knows where the tensors are."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys of the mask and its offset: of a static cache its whole length."""
        return self.max_length, 0

    def reset(self) -> None:
        CacheLayerMixin.reset(self)
        if self.is_initialized:
            self.seen.zero_()
        self.is_empty, self._unwritten = True, None

    def _new_keeping_all(self) -> FixedLayer:
        return FixedLayer(self.max_length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._change_rows(_selected(beam_idx))

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._change_rows(lambda tensor: _in_place(tensor, change))

    def _outgrow(self, tokens: int) -> None:
        """Nothing, see `make_room`."""


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """The cache that `generate` makes for a model, with growing layers in place of those that copy."""
    cache = DynamicCache(config=config)
    adopt(cache)
    return cache


def adopt(cache: Cache, spans: Mapping[int, SpansOf] | None = None, max_length: int = 0) -> None:
    """Give a new cache of Transformers our layers; layers of other kinds, such as sliding windows, stay as they are.

    Args:
        cache: is changed.
        spans: those of layers that become rings, by number.
        max_length: tokens that a ring is made for; a static cache knows that itself.
    """
    if not getattr(cache, "offloading", False):
        cache.layers = [_ours(layer, (spans or {}).get(i), max_length) for i, layer in enumerate(cache.layers)]


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of keys and values.

    Attributes:
        allocated: what the cache's tensors take.
        planned: what its spans have, and of layers that keep everything, what they keep.
        dense: what the same layers would take if each kept `max_length` tokens of every head, where that is known.
    """

    allocated: int
    planned: int
    dense: int


def cache_bytes(cache: Cache) -> CacheBytes:
    """The memory of a cache that has seen a prompt, beside what its plan says and what a dense cache would take."""
    allocated = planned = dense = 0
    for layer in cache.layers:
        for kept in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if kept is None:
                continue
            allocated += kept.untyped_storage().nbytes()
            size = kept.numel() * kept.element_size()
            if isinstance(layer, RingLayer) and layer.layout is not None:
                token = kept.shape[0] * kept.shape[2] * kept.element_size()
                planned += token * layer.layout.total
                dense += token * len(layer.layout.sinks) * layer.max_length
            else:
                planned, dense = planned + size, dense + size
    return CacheBytes(allocated, planned, dense)


@dataclass(frozen=True)
class Prompt:
    """What `generate` reads into a cache before it decodes.

    Attributes:
        end: tokens of the prompt, those that were in the cache before and padding included.
        verifies: whether it decodes by candidates, of which one forward verifies several (assisted decoding).
    """

    end: int
    verifies: bool


def note_prompt(cache: Cache, prompt: Prompt | None) -> None:
    """Tell a cache what `generate` is about to read into it; None if that is not known."""
    cache.sparse_patch_prompt = prompt  # type: ignore[attr-defined]


def prompt_of(cache: Any) -> Prompt | None:
    """What the last `generate` with a cache read into it; None if there was none."""
    prompt: Prompt | None = getattr(cache, "sparse_patch_prompt", None)
    return prompt


def ring_of(cache: Any, layer: int) -> RingLayer | None:
    """The ring that is one layer of a cache, if it is one."""
    found = _layer(cache, layer)
    return found if isinstance(found, RingLayer) else None


def keep_all(cache: Any, layer: int) -> None:
    """Put a layer that keeps every token in the place of a ring that has forgotten nothing yet."""
    ring = ring_of(cache, layer)
    assert ring is not None and ring.is_empty
    cache.layers[layer] = ring.keeping_all()


def max_length_of(cache: Any, layer: int) -> int | None:
    """Tokens that one layer of a cache is made for; None where it grows without an end."""
    found = _layer(cache, layer)
    if isinstance(found, RingLayer):
        return found.max_length
    return found.max_cache_len if isinstance(found, StaticLayer) else None


def memory_of(cache: Any, layer: int) -> LayerMemory | None:
    """The memory of one layer of a cache; None for a cache that has no room for it."""
    memory = getattr(_layer(cache, layer), "memory", None)
    return memory if isinstance(memory, LayerMemory) else None


def copies(cache: Any, layer: int) -> bool:
    """Whether a layer of a cache copies all its keys for every token."""
    return type(_layer(cache, layer)) is DynamicLayer


def _layer(cache: Any, layer: int) -> Any:
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layers = getattr(cache, "layers", ())
    return layers[layer] if layer < len(layers) else None


def _ours(layer: Any, spans: SpansOf | None, max_length: int) -> Any:
    if type(layer) not in (DynamicLayer, StaticLayer) or layer.is_initialized:
        return layer
    if type(layer) is DynamicLayer:
        return GrowingLayer() if spans is None else RingLayer(spans, max_length)
    length = layer.max_cache_len
    return FixedLayer(length) if spans is None else FixedRingLayer(spans, length)


def _moved(kept: torch.Tensor, old: RingLayout, new: RingLayout) -> torch.Tensor:
    """What the slots of a ring hold, in the slots of a larger one; what a head had no slot for was never there."""
    moved = kept.new_zeros(len(kept), new.total, kept.shape[2])
    for before, after in zip(old.slices, new.slices, strict=True):
        moved[:, after.start : after.start + before.stop - before.start] = kept[:, before]
    return moved


def _selected(rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_select(0, rows.to(tensor.device))


def _in_place(tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The changed tensor where the old one was, if it has its shape still; else marked as one that stays there."""
    changed = change(tensor)
    if changed.shape == tensor.shape:
        return tensor.copy_(changed)
    torch._dynamo.mark_static_address(changed)
    return changed


def _lies_in(kept: torch.Tensor, room: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether what is kept still lies in the room (beam search and the like replace it), and the new tokens fit in."""
    still = kept.data_ptr() == room.data_ptr() and len(kept) == len(room) and kept.dtype == room.dtype
    fits = room.shape[-2] >= kept.shape[-2] + new.shape[-2] and torch.promote_types(room.dtype, new.dtype) == room.dtype
    return still and fits


def _with_room(old: torch.Tensor, new: torch.Tensor, length: int, end: int) -> torch.Tensor:
    """Room for more than `end` tokens, the first `length` filled, in a dtype that holds old and new ones."""
    dtype = torch.promote_types(old.dtype, new.dtype) if length else new.dtype
    room = new.new_empty((*new.shape[:-2], end + _SPARE + end // 8, new.shape[-1]), dtype=dtype)
    if length:
        room[..., :length, :] = old
    return room


def ordinary_tensors() -> AbstractContextManager[None]:
    """In a `with` block new tensors can be written in place later on, inside `torch.inference_mode` and outside."""
    inside = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return _outside_inference_mode() if inside else nullcontext()


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield
