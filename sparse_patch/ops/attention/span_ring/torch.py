"""PyTorch backend: each KV head reads its slots in place, and of the forward's own keys what `attention.span` reads."""

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.attention.span.torch import attend_in_float32, attend_visible, query_slices
from sparse_patch.ops.attention.span_ring.ring import Ring, own_keys
from sparse_patch.plans import in_span, widest


def attend(call: AttentionCall, ring: Ring, before: torch.Tensor) -> Attended:
    """See `ops.attention.span_ring.attend`."""
    if call.q.shape[2] == 1:
        layout, held = ring.layout, ring.layout.positions(before + 1)[:, None]
        parts = [
            attend_visible(
                call,
                q,
                ring.k[:, at],
                ring.v[:, at],
                [(slice(None), in_span(before[:, None, None], held[..., at], *span))],
            )
            for q, at, span in zip(call.q.split(call.group_size, 1), layout.slices, layout.spans, strict=True)
        ]
        outs, lses = zip(*parts, strict=True)
        return Attended(torch.cat(outs, 1).to(call.q.dtype), torch.cat(lses, 1))
    out, lse = attend_in_float32(*own_keys(call, ring.layout, before))
    _add_ring(call, ring, before, out, lse)
    return Attended(out.to(call.q.dtype), lse)


def _add_ring(call: AttentionCall, ring: Ring, before: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Merge attention to the ring into an output and an LSE, both in float32, in place."""
    batch, _, q_length, _ = call.q.shape
    group, held = call.group_size, ring.layout.positions(before)
    for head, ((sink, window), slots) in enumerate(zip(ring.layout.spans, ring.layout.slices, strict=True)):
        heads = slice(head * group, (head + 1) * group)
        for queries in query_slices(q_length, batch * group * (slots.stop - slots.start)):
            past_window = window is not None and queries.start + 1 >= widest(window)
            if past_window and not sink:
                break
            read = slice(slots.start, slots.start + sink) if past_window else slots
            query = before[:, None] + torch.arange(queries.start, queries.stop, device=before.device)
            visible = in_span(query[..., None], held[:, None, read], sink, window)
            of_queries, masks = call.q[:, heads, queries], [(slice(None), visible)]
            part = attend_visible(call, of_queries, ring.k[:, read], ring.v[:, read], masks)
            _merge(out[:, heads, queries], lse[:, heads, queries], *part)


def _merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge attention to other keys into `out` `[..., Dv]` and `lse` `[...]`, in place."""
    both = torch.logaddexp(lse, part_lse)
    base = both.masked_fill(both.isneginf(), 0.0)
    out.mul_((lse - base).exp()[..., None]).add_(part * (part_lse - base).exp()[..., None])
    lse.copy_(both)


def write(ring: Ring, k: torch.Tensor, v: torch.Tensor, before: torch.Tensor) -> None:
    """See `ops.attention.span_ring.write`. No slot is written twice, because the order of such writes is undefined."""
    layout, length = ring.layout, k.shape[2]
    for head, (slots, (sink, _), turn) in enumerate(zip(layout.slices, layout.spans, layout.turns, strict=True)):
        of_head = ring.k[:, slots], ring.v[:, slots], k[:, head], v[:, head]
        last = torch.arange(max(length - turn, 0), length, device=k.device)  # no two tokens are a turn apart
        position = before[:, None] + last
        slot = layout.slots(head, position) - slots.start
        _put(*of_head, slot, last.expand_as(position), position >= 0)
        if length > turn:  # tokens of the sink that come before these
            slot = torch.arange(sink, device=k.device).expand(len(k), -1)
            token = slot - before[:, None]
            _put(*of_head, slot, token, (token >= 0) & (token < length - turn))


def _put(
    kept_k: torch.Tensor,
    kept_v: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot: torch.Tensor,
    token: torch.Tensor,
    real: torch.Tensor,
) -> None:
    """Write tokens, int64 `[B, n]`, of `k` and `v` `[B, S, D]` to slots of `kept_k` and `kept_v`, where `real`."""
    rows = torch.arange(len(k), device=k.device)[:, None]
    for kept, new in ((kept_k, k), (kept_v, v)):
        tokens = new[rows, token.clamp(0, new.shape[1] - 1)]
        kept[rows, slot] = torch.where(real[..., None], tokens, kept[rows, slot])
