"""The ring: which slot keeps which token."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import NamedTuple

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.plans import GrowingWindow, SpanPlan, Window, check_spans, spans_of, widest
from sparse_patch.plans.once import once


class Run(NamedTuple):
    """KV heads that follow each other and have the same span and capacity.

    Attributes:
        heads: the heads.
        slots: their slots, head by head.
        sink: see `RingLayout.spans`.
        window: see `RingLayout.spans`.
        turn: number of slots of each head that are written in turn.
    """

    heads: slice
    slots: slice
    sink: int
    window: Window
    turn: int

    @property
    def number(self) -> int:
        """Number of heads."""
        return int(self.heads.stop - self.heads.start)

    def query_heads(self, group: int) -> slice:
        """The query heads, `group` for each KV head."""
        return slice(self.heads.start * group, self.heads.stop * group)

    def of(self, kept: torch.Tensor) -> torch.Tensor:
        """The heads' keys or values, as a view `[B, heads, capacity, D]` of those of the layer, `[B, total, D]`."""
        return kept[:, self.slots].unflatten(1, (self.number, self.sink + self.turn))

    def places(self, positions: torch.Tensor) -> torch.Tensor:
        """Slots within each head of tokens at positions `[...]`; padding gets a slot written in turn."""
        in_sink = (positions >= 0) & (positions < self.sink)
        return torch.where(in_sink, positions, self.sink + (positions - self.sink) % self.turn)

    def held(self, tokens: torch.Tensor) -> torch.Tensor:
        """Positions of the tokens in each head's slots, `[B, capacity]`, of rows with `tokens` `[B]`; -1 if empty."""
        latest, slot = tokens[:, None] - 1, torch.arange(self.sink + self.turn, device=tokens.device)
        position = torch.where(slot < self.sink, slot, latest - (latest - slot) % self.turn)
        return position.masked_fill(slot > latest, -1)


@dataclass(frozen=True)
class RingLayout:
    """Where one layer keeps the keys of its KV heads, head by head. All numbers are Python ints, no device sync.

    A head has `capacity` slots. The token at position `p`, counted from its row's first real token, lies in the head's
    slot `p` if `p < sink`, else in `sink + (p - sink) mod turn`, where `turn` is the capacity without the sink:
    the window, or the widest size of a growing one. So once a row has seen `t` tokens, a head holds the tokens below
    `min(sink, t)` and the last tokens, from `max(sink, t - window)` on. It fills from its first slot to its last.

    Attributes:
        sinks: as in `SpanPlan`, one per KV head.
        windows: as in `SpanPlan`; None for a head that keeps everything.
        capacities: slots of each head: sink and widest window. For a head that keeps everything, the most tokens that a
            row can have; beyond them it forgets the oldest.

    Raises:
        ValueError: the spans are invalid, or a capacity is not what its span needs.
    """

    sinks: tuple[int, ...]
    windows: tuple[Window, ...]
    capacities: tuple[int, ...]

    def __post_init__(self) -> None:
        check_spans(self.sinks, self.windows)
        needs = [None if window is None else sink + widest(window) for sink, window in self.spans]
        fits = [
            slots >= 1 if need is None else slots == need for slots, need in zip(self.capacities, needs, strict=True)
        ]
        if not all(fits):
            raise ValueError(f"capacities {self.capacities} are not sink and window, {needs}")

    @classmethod
    def of(cls, sinks: Sequence[int], windows: Sequence[Window], room: int) -> "RingLayout":
        """The layout for rows of at most `room` tokens; a head whose span is that long keeps everything."""
        spans = zip(sinks, windows, strict=True)
        kept = tuple(None if window is None or sink + widest(window) >= room else window for sink, window in spans)
        sizes = tuple(
            room if window is None else sink + widest(window) for sink, window in zip(sinks, kept, strict=True)
        )
        return cls(tuple(sinks), kept, sizes)

    @property
    def spans(self) -> list[tuple[int, Window]]:
        """Sink and window of each KV head; the sink of a head that keeps everything is 0."""
        return spans_of(self.sinks, self.windows)

    @property
    def starts(self) -> list[int]:
        """First slot of each head."""
        return first_slots(self.capacities)

    @property
    def total(self) -> int:
        """Number of slots of all heads."""
        return sum(self.capacities)

    @property
    def slices(self) -> list[slice]:
        """The slots of each head."""
        return [slice(start, start + slots) for start, slots in zip(self.starts, self.capacities, strict=True)]

    @once
    def runs(self) -> list[Run]:
        """The heads in runs."""
        heads, runs = zip(self.spans, self.capacities, strict=True), []
        head = slot = 0
        for ((sink, window), slots), run in groupby(heads):
            number = len(list(run))
            of_heads, of_slots = slice(head, head + number), slice(slot, slot + number * slots)
            runs.append(Run(of_heads, of_slots, sink, window, slots - sink))
            head, slot = of_heads.stop, of_slots.stop
        return runs

    @once
    def grows(self) -> bool:
        """Whether a window grows: its ring holds the widest size, so not all filled slots are read."""
        return any(isinstance(window, GrowingWindow) for window in self.windows)

    def positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """Positions of the tokens in the slots once rows have seen `tokens` `[B]`: int64 `[B, total]`, -1 if empty."""
        return torch.cat([run.held(tokens).repeat(1, run.number) for run in self.runs], 1)


def first_slots(capacities: Sequence[int]) -> list[int]:
    """Where the slots of each head begin."""
    return [0, *accumulate(capacities)][:-1]


@dataclass(frozen=True)
class Ring:
    """The keys and values that one layer keeps.

    Attributes:
        layout: which slot keeps which token.
        k: `[B, total, D]`.
        v: `[B, total, Dv]`. Slots that hold no token must be finite.
    """

    layout: RingLayout
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def empty(cls, layout: RingLayout, k: torch.Tensor, v: torch.Tensor) -> "Ring":
        """A ring of zeros for keys and values like these, `[B, Hkv, S, D]` and `[B, Hkv, S, Dv]`."""
        return cls(layout, *(x.new_zeros(len(x), layout.total, x.shape[-1]) for x in (k, v)))


def tokens_before(
    seen: int | torch.Tensor, kv_start: torch.Tensor | None, batch: int, device: torch.device
) -> torch.Tensor:
    """Tokens that each row had before a forward, int64 `[B]`; -n if the forward begins with n tokens of padding.

    Args:
        seen: tokens of the cache, including padding; for a static cache, int64 `[]` on the device.
        kv_start: first real token of each row, int64 `[B]`; None if no row is padded.
        batch: number of rows.
        device: device of the result.
    """
    if kv_start is not None:
        return seen - kv_start
    if isinstance(seen, int):
        return torch.full((batch,), seen, device=device)
    return seen.repeat(batch)


def own_keys(call: AttentionCall, layout: RingLayout, before: torch.Tensor) -> tuple[AttentionCall, SpanPlan]:
    """A forward's attention to its own keys only, as call and plan: rows began `before` tokens before these keys."""
    alone = replace(call, q_start=0, kv_start=-before, kv_end=None)
    return alone, SpanPlan.of(alone, layout.sinks, layout.windows)
