"""The oracle: a float32 softmax over the slots and the forward's own keys. It is slow, but obviously right."""

from dataclasses import replace

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.attention.span.reference import attend_under
from sparse_patch.ops.attention.span_ring.ring import Ring
from sparse_patch.plans import in_span


def attend(call: AttentionCall, ring: Ring, before: torch.Tensor) -> Attended:
    """See `ops.attention.span_ring.attend`."""
    query = before[:, None] + torch.arange(call.q.shape[2], device=before.device)
    alone = call.q.shape[2] == 1  # then the ring holds the token itself
    held = ring.layout.positions(before + 1 if alone else before)
    outs, lses = [], []
    for head, (span, slots) in enumerate(zip(ring.layout.spans, ring.layout.slices, strict=True)):
        key, k, v = held[:, slots], ring.k[:, None, slots], ring.v[:, None, slots]
        if not alone:
            key = torch.cat([key, query], 1)
            k, v = torch.cat([k, call.k[:, head, None]], 2), torch.cat([v, call.v[:, head, None]], 2)
        group = replace(call, q=call.q.unflatten(1, (-1, call.group_size))[:, head], k=k, v=v)
        mask = in_span(query[..., None], key[:, None], *span)[:, None].expand(-1, call.group_size, -1, -1)
        out, lse, _ = attend_under(group, k, v, mask)
        assert lse is not None, "the oracle always gives it"
        outs.append(out)
        lses.append(lse)
    return Attended(torch.cat(outs, 1), torch.cat(lses, 1))


def write(ring: Ring, k: torch.Tensor, v: torch.Tensor, before: torch.Tensor) -> None:
    """See `ops.attention.span_ring.write`. For every slot, finds which token it holds afterwards."""
    position = ring.layout.positions(before + k.shape[2])
    token = position - before[:, None]
    is_new = (position >= 0) & (token >= 0)
    rows = torch.arange(len(k), device=k.device)[:, None]
    for head, slots in enumerate(ring.layout.slices):
        for kept, new in ((ring.k, k), (ring.v, v)):
            tokens = new[rows, head, token[:, slots].clamp(0, k.shape[2] - 1)]
            kept[:, slots] = torch.where(is_new[:, slots, None], tokens, kept[:, slots])
