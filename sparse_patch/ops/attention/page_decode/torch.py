"""PyTorch backend: gathers the listed keys and computes nothing else, so it saves time on a CPU too.

Float32 keys of a plan of every page are read in place. Three kinds of tensors pass, a chunk at a time, through a
float32 buffer that stays in the cache: gathered keys, keys of another dtype, and values next to which padding or the
tail of a static buffer may lie. A weight of 0 does not silence a NaN, so such values become 0 in this buffer. Unused
entries of a list read its first token again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.attention.op import Attended
from sparse_patch.plans import PagePlan, leading

_CHUNK = 2048  # keys


@dataclass(frozen=True)
class _Keys:
    """The keys that the lists of a call name, in the order in which they are read."""

    position: torch.Tensor  # int64 [B, L, T], within the row
    readable: torch.Tensor | None  # bool [B, L, T]; None if all are
    slot: torch.Tensor | None  # int64 [B, L, T], their place in the call's buffers; None for the buffers as they are
    groups: int  # KV heads, or query heads if each has its own list

    def parts(self, x: torch.Tensor, silenced: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
        """Keys or values `[B, Hkv, S, D]` in the order of the lists, as float32 parts `[B, groups, n, D]` along T.

        A part lives until the next one is asked for. Tokens that are `silenced`, bool `[B, L, T]`, become 0.
        """
        if silenced is None and self.slot is None and x.dtype == torch.float32:
            yield x
            return
        length = self.position.shape[-1]
        buffer = x.new_empty(x.shape[0], self.groups, min(_CHUNK, length), x.shape[-1], dtype=torch.float32)
        for begin in range(0, length, _CHUNK):
            end = min(begin + _CHUNK, length)
            part = buffer[:, :, : end - begin]
            if self.slot is None:
                part.copy_(x[:, :, begin:end])
            else:
                _gather(x, self.slot[..., begin:end], part)
            if silenced is not None:
                part.masked_fill_(silenced[..., begin:end, None], 0.0)
            yield part


def attend(call: AttentionCall, plan: PagePlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.page_decode.attend`."""
    q_length = call.q.shape[2]
    keys = _keys(call, plan)
    q = call.q.float().unflatten(1, (keys.groups, -1)).flatten(2, 3)
    scores = torch.cat([q @ part.transpose(-1, -2) for part in keys.parts(call.k)], -1).mul_(call.scale)
    scores = apply_softcap(scores, call.softcap).unflatten(2, (-1, q_length))  # [B, groups, G, Sq, T]
    logits = _by_position(scores[..., -1, :].flatten(1, 2), call) if plan.wants_logits else None

    query = torch.arange(q_length, device=q.device) + (call.lengths() - q_length)[:, None]  # position, [B, Sq]
    visible = keys.position[:, :, None] <= query[:, None, :, None]
    if keys.readable is not None:
        visible = visible & keys.readable[:, :, None]
    scores.masked_fill_(~visible[:, :, None], -torch.inf)
    lse = scores.logsumexp(-1)
    empty = lse.isneginf()
    weights = scores.sub_(lse.masked_fill(empty, 0.0)[..., None]).exp_().flatten(2, 3)
    silenced = ~keys.readable if keys.slot is None and keys.readable is not None else None
    out, begin = q.new_zeros(*q.shape[:3], call.v.shape[-1]), 0
    for part in keys.parts(call.v, silenced):
        out += weights[..., begin : begin + part.shape[2]] @ part
        begin += part.shape[2]
    out = out.view(*lse.shape, -1).masked_fill_(empty[..., None], 0.0).to(call.q.dtype)
    return Attended(out.flatten(1, 2), lse.flatten(1, 2), logits)


def _keys(call: AttentionCall, plan: PagePlan) -> _Keys:
    """The keys that the plan's lists name."""
    starts, lengths = call.row_starts()[:, None, None], call.lengths()[:, None, None]
    kv_heads = call.k.shape[1]
    if plan.pages is None or plan.counts is None:
        position = torch.arange(call.kv_length, device=call.k.device) - starts
        partial = call.kv_start is not None or call.kv_end is not None
        return _Keys(position, (position >= 0) & (position < lengths) if partial else None, None, kv_heads)
    tokens = torch.arange(plan.page_size, device=call.k.device)
    position = (plan.pages.long()[..., None] * plan.page_size + tokens).flatten(-2)
    readable = leading(plan.pages, plan.counts).repeat_interleave(plan.page_size, -1) & (position < lengths)
    instead = torch.where(plan.counts[..., None] > 0, position[..., :1] + starts, 0)
    slot = torch.where(readable, position + starts, instead)
    return _Keys(position, readable, slot, max(kv_heads, slot.shape[1]))


def _gather(x: torch.Tensor, slots: torch.Tensor, target: torch.Tensor) -> None:
    """Rows `slots` `[B, L, n]` of `x` `[B, Hkv, S, D]` into `target` `[B, groups, n, D]`.

    One `index_select` per row and head, because only it copies rows of any strides at the speed of memory.
    """
    batch, groups = target.shape[:2]
    per_list, per_kv_head = groups // slots.shape[1], groups // x.shape[1]
    for row in range(batch):
        for group in range(groups):
            rows, chosen = x[row, group // per_kv_head], slots[row, group // per_list]
            if x.dtype == target.dtype:
                torch.index_select(rows, 0, chosen, out=target[row, group])
            else:
                target[row, group].copy_(rows.index_select(0, chosen))


def _by_position(scores: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Scores `[B, Hq, S]` by key as scores by position within the row; undefined after the row's length."""
    if call.kv_start is None:
        return scores.clone()
    slots = torch.arange(scores.shape[-1], device=scores.device) + call.kv_start[:, None]
    return scores.gather(-1, slots.clamp(max=scores.shape[-1] - 1)[:, None].expand_as(scores))
