"""PyTorch backend: gathers the keys that a slice of queries reads and computes little else, so it saves time on CPUs.

A slice of queries of one KV head reads the sink and one piece of keys: from the start of its first query's window to
its last query. Only the sink and the columns at the piece's two ends need a mask, unless rows are padded. A weight of 0
does not silence a NaN, so a key of the row is read in place of every key that is not the row's.
"""

from collections.abc import Sequence

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.kernels.slices import SLICE_BYTES, slices
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.attention.weights import HIDDEN, lse_of, weights_of
from sparse_patch.plans import GrowingWindow, SpanPlan, Window, in_span, widest

Masks = Sequence[tuple[slice, torch.Tensor]]  # columns, and which of them each query sees, bool `[B, n, columns]`
_QUERIES = 128  # queries per slice; each query reads the windows of all of them


def attend(call: AttentionCall, plan: SpanPlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.span.attend`."""
    out, lse = attend_in_float32(call, plan)
    return Attended(out.to(call.q.dtype), lse)


def attend_in_float32(call: AttentionCall, plan: SpanPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[B, Hq, Sq, Dv]`, in memory as `[B, Sq, Hq, Dv]`, and LSE, both in float32."""
    batch, heads, q_length, _ = call.q.shape
    group = call.group_size
    out = call.q.new_empty(batch, q_length, heads, call.v.shape[-1], dtype=torch.float32).transpose(1, 2)
    lse = call.q.new_empty(batch, heads, q_length, dtype=torch.float32)
    rows = torch.arange(batch, device=call.q.device)[:, None]
    for head, (sink, window) in enumerate(plan.spans):
        of_group = slice(head * group, (head + 1) * group)
        keys = call.kv_length if window is None else min(call.kv_length, sink + widest(window) + _QUERIES)
        for queries in query_slices(q_length, batch * group * keys):
            slot, masks = _read(call, queries, sink, window)
            q, k, v = call.q[:, of_group, queries], call.k[rows, head, slot], call.v[rows, head, slot]
            out[:, of_group, queries], lse[:, of_group, queries] = attend_visible(call, q, k, v, masks)
    return out, lse


def query_slices(q_length: int, scores_each: int) -> list[slice]:
    """Slices of the queries, each query with `scores_each` scores."""
    bytes_each = max(1, 4 * scores_each)
    return list(slices(q_length, bytes_each, limit=min(SLICE_BYTES, _QUERIES * bytes_each)))


def attend_visible(
    call: AttentionCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: Masks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a group's queries `[B, G, n, D]` to the keys `[B, T, D]` that no mask hides.

    Returns:
        The output `[B, G, n, Dv]` and the LSE `[B, G, n]`, both in float32.
    """
    group, n = q.shape[1:3]
    scores = (q.float() * call.scale).flatten(1, 2) @ k.float().mT
    scores = apply_softcap(scores, call.softcap).unflatten(1, (group, n))
    for columns, visible in masks:
        scores[..., columns].masked_fill_(~visible[:, None], HIDDEN)
    weights = weights_of(scores, None)
    lse = lse_of(scores, weights)
    out = (weights.flatten(1, 2) @ v.float()).unflatten(1, (group, n))
    return out.masked_fill_(lse.isneginf()[..., None], 0.0), lse


def _read(call: AttentionCall, queries: slice, sink: int, window: Window) -> tuple[torch.Tensor, Masks]:
    """Slots that a slice of queries reads, int64 `[B, T]`, and masks of those that each query sees."""
    device, starts = call.q.device, call.row_starts()[:, None]
    n = queries.stop - queries.start
    end = call.end() - (call.q.shape[2] - queries.stop)  # the slot after the last query's
    reach = call.kv_length - (call.q.shape[2] - queries.stop if call.kv_end is None else 0)  # upper bound of `end`
    piece = reach if window is None else min(widest(window) + n - 1, reach)
    begin = end - piece
    slot = (torch.arange(piece, device=device) + begin).expand(len(starts), -1)
    if piece < reach:
        sinks = torch.arange(sink, device=device) + starts
        slot = torch.cat([sinks.masked_fill(sinks >= begin, -1), slot], -1)  # no key twice
    key = torch.where(slot < 0, -1, slot - starts)
    query = (torch.arange(n, device=device) + (end - n) - starts)[..., None]
    whole = call.kv_start is None and call.kv_end is None and not isinstance(window, GrowingWindow)
    masks = [
        (columns, in_span(query, key[:, None, columns], sink, window))
        for columns in _edges(slot.shape[1] - piece + n, n, slot.shape[1], whole)
    ]
    return torch.minimum(torch.maximum(slot, starts.clamp(min=0)), end - 1), masks


def _edges(first: int, last: int, columns: int, whole: bool) -> list[slice]:
    """The first and the last columns; all columns if the others are not `whole`, which means seen by every query."""
    if not whole or first + last >= columns:
        return [slice(0, columns)]
    return [slice(0, first), slice(columns - last, columns)]
