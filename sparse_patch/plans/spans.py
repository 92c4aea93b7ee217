"""A sink and a window for each KV head: a plan that is known before any token is."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from sparse_patch.call import AttentionCall, causal_pairs
from sparse_patch.kernels.inference_mode import ordinary_tensors
from sparse_patch.plans.plan import SparsePlan

_EVERY = 1 << 40  # more keys than any row has
_SIDE = 128  # tokens per block in pictures


@dataclass(frozen=True)
class GrowingWindow:
    """A window that grows with the text: the query at position i has `(base + slope * (i + 1)) >> 16` keys.

    Attributes:
        base: in 2^-16 tokens; may be negative.
        slope: in 2^-16 tokens per token; at most 2^16, so that no window moves back to a key that it has left.
        least: minimum number of keys of a query.
        most: maximum number of keys of a query.
    """

    base: int
    slope: int
    least: int
    most: int

    def at(self, position: int) -> int:
        """Number of keys of the query at a position, including its own."""
        return min(max((self.base + self.slope * (position + 1)) >> 16, self.least), self.most)


Window = int | GrowingWindow | None  # keys up to the query itself; None for every key


@dataclass(frozen=True)
class SpanPlan(SparsePlan):
    """A sink and a window for each KV head, in tokens: what StreamingLLM, DuoAttention and MoA decide beforehand.

    The query at position `i` of its row reads the keys `j <= i` with `j < sink` or `i - j < window`. Positions count
    from the row's first real token, and the queries are the last tokens of the call, so the rule is the same whether a
    prompt comes at once, in chunks or token by token. Nothing here reads a length on the host.

    Attributes:
        sinks: first tokens of a row that every query reads, one number per KV head.
        windows: keys that a query reads up to itself, one window per KV head; 1 is only its own key, None is every key.
        heads: query heads, Hq; head `h` uses KV head `h // (Hq // Hkv)`.
        q_length: queries of the call, Sq.
        capacity: keys that the call's `k` has room for, valid or not (a Python int).
        lengths: real keys of each row, int64 `[B]`.
        row_starts: where in `k` each row begins, int64 `[B]`; negative if its first keys are not in `k`.

    Raises:
        ValueError: sinks and windows are not one per KV head, a sink is negative or a window below 1.
    """

    known_beforehand = True

    sinks: tuple[int, ...]
    windows: tuple[Window, ...]
    heads: int
    q_length: int
    capacity: int
    lengths: torch.Tensor
    row_starts: torch.Tensor

    def __post_init__(self) -> None:
        check_spans(self.sinks, self.windows)
        if self.heads % len(self.sinks):
            raise ValueError(f"{self.heads} query heads cannot share the spans of {len(self.sinks)} KV heads")

    @classmethod
    def of(cls, call: AttentionCall, sinks: Sequence[int], windows: Sequence[Window]) -> "SpanPlan":
        """The plan of spans for a call; the arguments are like the attributes."""
        if len(sinks) != call.k.shape[1]:
            raise ValueError(f"{len(sinks)} spans for {call.k.shape[1]} KV heads")
        _, heads, q_length, _ = call.q.shape
        of_rows = call.lengths(), call.row_starts()
        return cls(tuple(sinks), tuple(windows), heads, q_length, call.kv_length, *of_rows)

    @property
    def spans(self) -> list[tuple[int, Window]]:
        """Sink and window of each KV head; the sink of a head that reads everything is 0."""
        return spans_of(self.sinks, self.windows)

    def mask(self) -> torch.Tensor:
        """The plan as a mask of tokens, bool `[B, Hq, Sq, capacity]`: for the oracle and for pictures."""
        device = self.lengths.device
        key = (torch.arange(self.capacity, device=device) - self.row_starts[:, None])[:, None]
        query = (torch.arange(self.q_length, device=device) + (self.lengths - self.q_length)[:, None])[..., None]
        of_kv_heads = torch.stack([in_span(query, key, *span) for span in self.spans], 1)
        return of_kv_heads.repeat_interleave(self.heads // len(self.sinks), 1)

    def computed_pairs(self) -> torch.Tensor:
        """(Query, key) pairs of real tokens that the plan computes, int64 `[B, Hq]`."""
        numbers = tuple((sink, *window_parameters(window)) for sink, window in self.spans)
        sinks, *window = _table(numbers, self.lengths.device)
        length = self.lengths[:, None] - self.q_length + torch.arange(1, self.q_length + 1, device=self.lengths.device)
        keys = torch.minimum(length[..., None], sinks + _grown(length[..., None] - 1, *window))
        of_kv_heads = keys.masked_fill(length[..., None] < 1, 0).sum(1)
        return of_kv_heads.repeat_interleave(self.heads // len(self.sinks), 1)

    def pairs_at(self, lengths: torch.Tensor) -> torch.Tensor:
        """See `SparsePlan.pairs_at`."""
        return replace(self, q_length=1, lengths=lengths, row_starts=lengths).computed_pairs().sum(0)

    @property
    def stacks_with(self) -> Hashable | None:
        """See `SparsePlan.stacks_with`. Many queries are counted at once: counting takes memory for each of them."""
        return (self.sinks, self.windows, self.heads, self.lengths.device) if self.q_length == 1 else None

    def stacked(self, others: Sequence["SpanPlan"]) -> "SpanPlan":
        """See `SparsePlan.stacked`."""
        lengths = torch.cat([plan.lengths for plan in (self, *others)])
        return replace(self, lengths=lengths, row_starts=torch.zeros_like(lengths))

    def causal_pairs(self) -> torch.Tensor:
        """See `SparsePlan.causal_pairs`."""
        return causal_pairs(self.lengths - self.q_length, self.lengths, torch.zeros_like(self.lengths))

    def block_map(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SparsePlan.block_map`; blocks of `_SIDE` tokens."""
        length, (sink, window) = int(self.lengths[0]), self.spans[head * len(self.sinks) // self.heads]
        key = torch.arange(0, length, _SIDE)
        query = key[max(length - self.q_length, 0) // _SIDE :, None]
        causal = key <= query
        near = torch.minimum(key + _SIDE - 1, query)  # the key of the key block that is nearest to the query
        return causal & (in_span(query, key, sink, window) | in_span(query, near, sink, window)), causal


def check_spans(sinks: Sequence[int], windows: Sequence[Window]) -> None:
    """Refuse invalid spans.

    Raises:
        ValueError: the numbers of sinks and windows differ or are 0, a sink is negative, or a window is below 1.
    """
    if len(sinks) != len(windows) or not sinks:
        raise ValueError(f"spans need a sink and a window per KV head, got {len(sinks)} and {len(windows)}")
    if min(sinks) < 0 or any(window_parameters(window)[3] < 1 for window in windows):
        raise ValueError(f"a sink is 0 or more and a window 1 or more, got sinks {sinks} and windows {windows}")
    if any(isinstance(window, GrowingWindow) and not 0 <= window.slope <= 1 << 16 for window in windows):
        raise ValueError(f"a window grows by 0 to 1 token for each token, got windows {windows}")


def spans_of(sinks: Sequence[int], windows: Sequence[Window]) -> list[tuple[int, Window]]:
    """Sink and window of each KV head; the sink of a head that reads everything is 0."""
    return [(0 if window is None else sink, window) for sink, window in zip(sinks, windows, strict=True)]


def widest(window: int | GrowingWindow) -> int:
    """The most keys that any query has."""
    return window.most if isinstance(window, GrowingWindow) else window


def window_parameters(window: Window) -> tuple[int, int, int, int]:
    """`(most, base, slope, least)`: any window as the parameters of a `GrowingWindow`."""
    if isinstance(window, GrowingWindow):
        return window.most, window.base, window.slope, window.least
    return (_EVERY, 0, 0, _EVERY) if window is None else (window, 0, 0, window)


def in_span(query: torch.Tensor, key: torch.Tensor, sink: int, window: Window) -> torch.Tensor:
    """Whether queries read keys, both given by their position in the row. Only padding has negative positions."""
    causal = (key <= query) & (key >= 0)
    if window is None:
        return causal
    reach = _grown(query, *window_parameters(window)) if isinstance(window, GrowingWindow) else window
    return causal & ((key < sink) | (query - key < reach))


def _grown(position: torch.Tensor, most: Any, base: Any, slope: Any, least: Any) -> torch.Tensor:
    """Windows of queries at positions; see `GrowingWindow.at`."""
    return ((base + slope * (position + 1)) >> 16).clamp(least, most)


def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """Rows of numbers as the columns of a tensor, int64.

    A graph fills the tensor itself: it cannot copy to a GPU, and a graph for any length does not know all numbers.
    """
    if not torch.compiler.is_compiling():
        return _kept_table(rows, device)
    numbers = [torch.full((), number, dtype=torch.int64, device=device) for row in rows for number in row]
    return torch.stack(numbers).view(len(rows), -1).T


@lru_cache(maxsize=1024)
def _kept_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """See `_table`. Cached: copying to a GPU makes the host wait."""
    with ordinary_tensors():
        return torch.tensor(rows, dtype=torch.int64, device=device).T.contiguous()
