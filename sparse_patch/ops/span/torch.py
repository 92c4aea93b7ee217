"""PyTorch backend: gathers the keys that a slice of queries reads and computes little else, so it saves time on CPUs.

A slice of queries of one KV head reads the sink and one piece of keys, from where the window of its first query begins
to its last query. A weight of 0 does not silence a NaN: in place of what is not the row's, a key that is gets read.
"""

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.slices import SLICE_BYTES, slices
from sparse_patch.plans import SpanPlan, Window, in_span, widest

_QUERIES = 128  # of a slice: each reads the windows of all of them


def attend(call: AttentionCall, plan: SpanPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.span.attend`."""
    out, lse = attend_in_float32(call, plan)
    return out.to(call.q.dtype), lse


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
            slot, visible = _read(call, queries, sink, window)
            q, k, v = call.q[:, of_group, queries], call.k[rows, head, slot], call.v[rows, head, slot]
            out[:, of_group, queries], lse[:, of_group, queries] = attend_visible(call, q, k, v, visible)
    return out, lse


def query_slices(q_length: int, scores_each: int) -> list[slice]:
    """Slices of the queries, of which each has so many scores."""
    bytes_each = max(1, 4 * scores_each)
    return list(slices(q_length, bytes_each, limit=min(SLICE_BYTES, _QUERIES * bytes_each)))


def attend_visible(
    call: AttentionCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A group's queries `[B, G, n, D]` over keys `[B, T, D]` where `visible`, bool `[B, n, T]`.

    Returns:
        The output `[B, G, n, Dv]` and the LSE `[B, G, n]`, both in float32.
    """
    group, n = q.shape[1:3]
    scores = (q.float().flatten(1, 2) @ k.float().mT).mul_(call.scale)
    scores = apply_softcap(scores, call.softcap).unflatten(1, (group, n))
    scores.masked_fill_(~visible[:, None], -torch.inf)
    largest = scores.amax(-1).clamp_(min=torch.finfo(torch.float32).min)  # finite: a query may have no key
    weights = scores.sub_(largest[..., None]).exp_()
    total = weights.sum(-1)
    out = (weights.flatten(1, 2) @ v.float()).unflatten(1, (group, n)).div_(total[..., None])
    return out.masked_fill_((total == 0)[..., None], 0.0), largest + total.log()


def _read(call: AttentionCall, queries: slice, sink: int, window: Window) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots that a slice of queries reads, int64 `[B, T]`, and which of them each query sees, bool `[B, n, T]`."""
    device, starts = call.q.device, call.row_starts()[:, None]
    n = queries.stop - queries.start
    end = call.end() - (call.q.shape[2] - queries.stop)  # the slot after the last query's
    reach = call.kv_length - (call.q.shape[2] - queries.stop if call.kv_end is None else 0)  # `end` at most
    piece = reach if window is None else min(widest(window) + n - 1, reach)
    begin = end - piece
    slot = (torch.arange(piece, device=device) + begin).expand(len(starts), -1)
    if piece < reach:
        sinks = torch.arange(sink, device=device) + starts
        slot = torch.cat([sinks.masked_fill(sinks >= begin, -1), slot], -1)  # no key twice
    key = torch.where(slot < 0, -1, slot - starts)
    query = torch.arange(n, device=device) + (end - n) - starts
    visible = in_span(query[..., None], key[:, None], sink, window)
    return torch.minimum(torch.maximum(slot, starts.clamp(min=0)), end - 1), visible
