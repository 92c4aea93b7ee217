"""Layers of a KV cache that keep the spans of their heads and forget the rest."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.integration.caches.layers import FixedLayer, GrowingLayer, in_place, selected, stays_in_place
from sparse_patch.integration.step import NotAStep, Step
from sparse_patch.kernels.autocast import as_autocast
from sparse_patch.kernels.inference_mode import OrdinaryState, ordinary_tensors
from sparse_patch.kernels.room import SPARE
from sparse_patch.ops.attention import span_ring
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.attention.span_ring import Ring, RingLayout
from sparse_patch.plans import Window

# Sinks and windows of a layer's KV heads, for a row length in tokens and a number of heads.
SpansOf = Callable[[int, int], tuple[Sequence[int], Sequence[Window]]]


class RingLayer(OrdinaryState, CacheLayerMixin):
    """A layer that keeps the span of each KV head: the first tokens of a row and a ring of its last ones.

    `update` returns only the keys and values of the forward. The hook attends to them and to the ring, and writes them
    (with `attend`, or with `write` after a forward with nothing before it). So a ring serves only patched models, and
    `expect` announces each forward. Nothing else keeps keys or values: keys that no span holds any longer are gone, and
    calls that need them are refused. If a ring cannot serve a first forward, nothing is lost yet, and `keeping_all`
    makes the layer to continue with.

    The spans belong to a length. If a text becomes longer and the span of some head is the whole length, the ring
    grows. Such heads get their spans at the new length; the other heads keep theirs.

    Attributes:
        keys: `[B, slots, D]`, all heads one after the other; see `RingLayout`.
        values: `[B, slots, Dv]`.
        max_length: the length: tokens of prompt and answer together.
        seen: number of tokens so far, including padding; see `get_seq_length`.
        is_empty: whether there are no tokens yet, known on the host.
        layout: which slot keeps what; None before the first forward.
        step: see `SteppedLayer`.
    """

    step: Step | None = None

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
        """Return the same keys and values `[B, Hkv, S, D]`, for the hook to attend to and to write.

        Raises:
            UnsupportedCallError: no patched attention module announced the forward, or the keys of the previous forward
                were never written.
        """
        if not self._expected or self._unwritten is not None:
            raise UnsupportedCallError(
                "a span cache serves the model that it was made for while it is patched, one forward at a time; "
                "start again with a new cache"
            )
        if self.step is None:
            self._outgrow(key_states.shape[-2])
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._expected, self._unwritten = False, (key_states, value_states)
        return key_states, value_states

    def expect(self) -> None:
        """Note that a patched attention module is about to call `update`."""
        self._expected = True

    @property
    def is_left_behind(self) -> bool:
        """Whether the first forward ran without the hook: the keys given to `update` were never written."""
        return self.is_empty and self._unwritten is not None

    def hands_over(self, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether `k` and `v` are the very tensors given to `update`. Nothing computed from them can be written."""
        return self._unwritten is not None and k is self._unwritten[0] and v is self._unwritten[1]

    def keeping_all(self) -> "GrowingLayer | FixedLayer":
        """A layer that keeps every token, to replace a ring that has forgotten nothing yet."""
        layer = self._new_keeping_all()
        if self._unwritten is not None:
            layer.update(*self._unwritten)
        return layer

    def _new_keeping_all(self) -> "GrowingLayer | FixedLayer":
        return GrowingLayer(self.max_length)

    def attend(
        self,
        call: AttentionCall,
        before: torch.Tensor,
        backend: str,
        known: int | None = None,
        return_lse: bool = False,
    ) -> Attended:
        """Attend to the ring and to the forward's own keys, and write these keys.

        Args:
            call: the forward, with only its own keys.
            before: see `span_ring.tokens_before`.
            backend: a backend that serves the call.
            known: see `span_ring.attend`.
            return_lse: whether the result must have the LSE.
        """
        if call.q.shape[2] == 1:
            self.write(call.k, call.v, before, backend, known)
            return span_ring.attend(call, self._ring, before, backend, known, return_lse)
        attended = span_ring.attend(call, self._ring, before, backend, known, return_lse)
        self.write(call.k, call.v, before, backend, known)
        return attended

    def holding(self, dtype: torch.dtype) -> torch.dtype:
        """Convert the ring to a precision that loses nothing of itself or of `dtype`, and return that precision."""
        assert self.keys is not None and self.values is not None
        wanted = torch.promote_types(self.keys.dtype, dtype)
        if wanted != self.keys.dtype:
            with ordinary_tensors():
                self.keys, self.values = self.keys.to(wanted), self.values.to(wanted)
            self.dtype = wanted
        return wanted

    @torch.no_grad()
    def write(
        self, k: torch.Tensor, v: torch.Tensor, before: torch.Tensor, backend: str, known: int | None = None
    ) -> None:
        """Keep those keys and values of a forward that the spans of later tokens hold; see `span_ring.write`."""
        span_ring.write(self._ring, k, v, before, backend, known)
        if self.step is None:
            self.seen += k.shape[2]  # in place for a static cache
        self.is_empty, self._unwritten = False, None

    @property
    def tokens(self) -> int:
        """See `SteppedLayer`."""
        return int(self.seen)

    @property
    def covered(self) -> int:
        """See `SteppedLayer`."""
        return 0

    def room_for_step(self, batch: int) -> None:
        """See `SteppedLayer`."""
        if self.is_empty or self.keys is None:
            raise NotAStep("a cache without tokens")
        if not self.max_length:
            raise NotAStep("a span cache that does not know how long the text becomes")
        if self.keys.shape[0] != batch:
            raise NotAStep("a cache of another number of rows")
        self._outgrow(1)

    def place(self) -> tuple[Any, ...]:
        """See `SteppedLayer`."""
        assert self.keys is not None and self.values is not None, "see room_for_step"
        return self.keys.data_ptr(), self.values.data_ptr(), self.keys.dtype, self.keys.shape[0], self.max_length

    def places_of_state(self) -> list[int]:
        """See `SteppedLayer`; a ring has no such tensors."""
        return []

    def advance(self) -> None:
        """See `SteppedLayer`."""
        self.seen += 1

    def take_back(self) -> None:
        """Undo an `update` after which nothing was written."""
        self._unwritten = None

    def make_room(self, length: int) -> None:
        """Grow the ring to hold rows of `length` tokens. It never shrinks."""
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
        """Number of tokens seen, not kept, because positions follow from it; in a step, int64 `[]` on the device."""
        if self.step is not None:
            return self.step.position
        if self.is_empty and self._unwritten is not None:  # nothing wrote the first forward, see `is_left_behind`
            return self.seen + self._unwritten[0].shape[-2]
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys of the mask, and its offset. The mask describes all tokens, kept or not."""
        if self.step is not None:
            return self.step.capacity, 0
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return self.max_length

    get_max_cache_shape = get_max_length  # the name before Transformers 5.17

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing for 0 tokens; refuse any other number.

        Raises:
            UnsupportedCallError: tokens would have to be removed.
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

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._change_rows(selected(beam_idx))

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
        """Make room for `tokens` more tokens and some spare ones, if a head has to keep all of them."""
        end = self.seen + tokens
        if end > self.max_length and (self.layout is None or None in self.layout.windows):
            self.make_room(end + SPARE + end // 8)

    @property
    def _ring(self) -> Ring:
        assert self.layout is not None and self.keys is not None and self.values is not None
        return Ring(self.layout, self.keys, self.values)

    def _layout(self, heads: int, before: RingLayout | None = None) -> RingLayout:
        """The layout for rows of `max_length`. If there was a layout, only heads that kept everything get new spans."""
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
    """The ring of a static cache: its tensors stay in place, its length is fixed, and its steps compile.

    Tokens are counted on the device, int64 `[]`. Beyond `max_length`, heads that keep everything forget the oldest
    tokens.
    """

    is_compileable = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        with ordinary_tensors():
            self.seen = torch.zeros((), dtype=torch.int64, device=self.device)
        for tensor in (self._ring.k, self._ring.v, self.seen):
            stays_in_place(tensor)
        span_ring.prepare(self._ring)

    def make_room(self, length: int) -> None:
        """Do nothing, because a graph relies on the place of the tensors."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys of the mask, and its offset. For a static cache the number is the whole length."""
        return self.max_length, 0

    def holding(self, dtype: torch.dtype) -> torch.dtype:
        """Return the ring's own precision; it never changes, see `make_room`."""
        assert self.keys is not None
        return self.keys.dtype

    def reset(self) -> None:
        CacheLayerMixin.reset(self)
        if self.is_initialized:
            self.seen.zero_()
        self.is_empty, self._unwritten = True, None

    def _new_keeping_all(self) -> FixedLayer:
        return FixedLayer(self.max_length)

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._change_rows(lambda tensor: in_place(tensor, change))

    def _outgrow(self, tokens: int) -> None:
        """Do nothing, see `make_room`."""


def _moved(kept: torch.Tensor, old: RingLayout, new: RingLayout) -> torch.Tensor:
    """Copy the slots of a ring into the slots of a larger one. Tokens beyond a head's old slots were never kept."""
    moved = kept.new_zeros(len(kept), new.total, kept.shape[2])
    for before, after in zip(old.slices, new.slices, strict=True):
        moved[:, after.start : after.start + before.stop - before.start] = kept[:, before]
    return moved
