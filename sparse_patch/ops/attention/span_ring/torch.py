"""PyTorch backend: each KV head reads its slots in place, and of the forward's own keys what `attention.span` reads."""

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.attention import one_token
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.attention.span.torch import attend_in_float32, attend_visible, query_slices
from sparse_patch.ops.attention.span_ring.ring import Ring, Run, own_keys
from sparse_patch.ops.attention.weights import lse_of, weights_of
from sparse_patch.plans import GrowingWindow, in_span, widest


def attend(
    call: AttentionCall, ring: Ring, before: torch.Tensor, known: int | None = None, return_lse: bool = True
) -> Attended:
    """See `ops.attention.span_ring.attend`."""
    if known is not None and one_token.serves(call) and not (return_lse or ring.layout.grows):
        outs = [_attend_filled(call, ring, known, run) for run in ring.layout.runs]
        return Attended(outs[0] if len(outs) == 1 else torch.cat(outs, 1))
    if call.q.shape[2] == 1:
        parts = [_attend_one(call, ring, before, run) for run in ring.layout.runs]
        out, lse = parts[0] if len(parts) == 1 else (torch.cat(each, 1) for each in zip(*parts, strict=True))
        return Attended(out.to(call.q.dtype), lse)
    out, lse = attend_in_float32(*own_keys(call, ring.layout, before))
    _add_ring(call, ring, before, out, lse)
    return Attended(out.to(call.q.dtype), lse)


def _attend_filled(call: AttentionCall, ring: Ring, known: int, run: Run) -> torch.Tensor:
    """The output of one token, of the heads of a run, after `known` tokens of each row: it reads all filled slots."""
    k, v = (run.of(kept)[:, :, : known + 1] for kept in (ring.k, ring.v))
    return one_token.attend(call.q[:, run.query_heads(call.group_size)], k, v, call.scale)


def _attend_one(call: AttentionCall, ring: Ring, before: torch.Tensor, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of one token, of the heads of a run."""
    batch, group = len(call.q), call.group_size
    heads = run.query_heads(group)
    k, v = (run.of(kept).float().flatten(0, 1) for kept in (ring.k, ring.v))
    q = (call.q[:, heads].float() * call.scale).reshape(len(k), group, -1)
    scores = apply_softcap(torch.bmm(k, q.mT).mT.reshape(batch, run.number * group, 1, -1), call.softcap)
    weights = weights_of(scores, _unseen(before, run))
    lse = lse_of(scores, weights)
    out = torch.bmm(weights.view(len(k), group, -1), v).view(batch, run.number * group, 1, -1)
    return out.masked_fill_((before < 0)[:, None, None, None], 0.0), lse


def _unseen(before: torch.Tensor, run: Run) -> torch.Tensor:
    """Which slots of each head of a run the next token does not read once it is written, bool `[B, 1, 1, capacity]`."""
    if isinstance(run.window, GrowingWindow):  # the ring holds its widest size
        return ~in_span(before[:, None], run.held(before + 1), run.sink, run.window)[:, None, None]
    return (torch.arange(run.sink + run.turn, device=before.device) > before[:, None])[:, None, None]


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
    length = k.shape[2]
    for run in ring.layout.runs:
        of_run = (run.of(ring.k), k[:, run.heads]), (run.of(ring.v), v[:, run.heads])
        first = max(length - run.turn, 0)  # no two tokens from here on are a turn apart
        position = before[:, None] + torch.arange(first, length, device=k.device)
        slot, real = run.places(position), position >= 0
        for kept, new in of_run:
            _put(kept, new[:, :, first:], slot, real)
        if first:  # tokens of the sink that come before these
            slot = torch.arange(run.sink, device=k.device).expand(len(k), -1)
            token = slot - before[:, None]
            real, token = (token >= 0) & (token < first), token.clamp(0, length - 1)
            for kept, new in of_run:
                _put(kept, new.gather(2, _index(token, new)), slot, real)


def write_one(ring: Ring, k: torch.Tensor, v: torch.Tensor, before: int) -> None:
    """`write` of one token after `before` tokens of each row, a number on the host."""
    for run in ring.layout.runs:
        slot = before if before < run.sink else run.sink + (before - run.sink) % run.turn
        run.of(ring.k)[:, :, slot] = k[:, run.heads, 0]
        run.of(ring.v)[:, :, slot] = v[:, run.heads, 0]


def _put(kept: torch.Tensor, new: torch.Tensor, slot: torch.Tensor, real: torch.Tensor) -> None:
    """Write tokens `[B, heads, n, D]` to slots `[B, n]` of `kept` `[B, heads, capacity, D]`, where they are `real`."""
    index = _index(slot, new)
    kept.scatter_(2, index, torch.where(real[:, None, :, None], new, kept.gather(2, index)))


def _index(tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Indices `[B, n]` along the tokens of `x` `[B, heads, S, D]`, for `gather` and `scatter_`."""
    return tokens[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
