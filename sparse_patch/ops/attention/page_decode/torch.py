"""PyTorch backend: reads the listed keys and computes little else, so it saves time on a CPU too.

The keys of a list are gathered, whole pages at once if every key of the call is real. If the lists name more keys than
the call has, as lists of many query heads may, the keys are read where they lie, and those that a head does not list
get a weight of 0. So are the keys of a plan of every page.

A weight of 0 does not silence a NaN. Therefore unused entries of a list read its first token again, and values next to
which padding or the tail of a static buffer may lie become 0 in a copy.
"""

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple, TypeVar

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.attention import one_token
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.attention.weights import lse_of, weights_of
from sparse_patch.plans import PagePlan, leading, marked

T = TypeVar("T")
_CHUNK = 2048  # keys that a copy in float32 holds at a time, so that it stays in the processor's cache


class _Places(dict[tuple[int, ...], torch.Tensor]):
    """Indices of listed keys in memory, by number of KV heads and by strides."""


class _Keys(NamedTuple):
    """The keys that a call reads."""

    k: torch.Tensor  # [B, groups, T, D]; groups are KV heads, or query heads if each has gathered keys of its own
    v: torch.Tensor  # [B, groups, T, Dv]
    hidden: (
        torch.Tensor | None
    )  # bool [B, L, 1 or Sq, T]: keys that the heads of a list do not see; None if they see all
    empty: torch.Tensor | None  # bool [B, L, 1 or Sq]: queries that see no key; None if all see one
    unreadable: torch.Tensor | None = None  # bool [B, 1, T]: values that may be NaN; None without such values


def attend(call: AttentionCall, plan: PagePlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.page_decode.attend`."""
    batch, heads, q_length, head_dim = call.q.shape
    keys = _keys(call, plan)
    if one_token.serves(call) and keys.unreadable is None and not (return_lse or plan.wants_logits):
        return Attended(_by_one_kernel(call, keys))
    groups = batch * keys.k.shape[1]
    q = (call.q.float() * call.scale).reshape(groups, -1, head_dim)
    products = [torch.bmm(part, q.mT) for part in _parts(keys.k)]  # keys by queries: faster than queries by keys
    scores = _joined(products).mT.reshape(batch, heads, q_length, -1)
    scores = apply_softcap(scores, call.softcap)
    lists = 1 if keys.hidden is None else keys.hidden.shape[1]
    of_lists = scores.unflatten(1, (lists, -1))
    weights = weights_of(of_lists, None if keys.hidden is None else keys.hidden[:, :, None])
    lse = lse_of(scores, weights.flatten(1, 2)) if return_lse or plan.wants_logits else None
    out = _summed(weights.view(groups, q.shape[1], -1), keys).view(*of_lists.shape[:4], -1)
    if keys.empty is not None:
        out.masked_fill_(keys.empty[:, :, None, :, None], 0.0)
    logits = _by_position(scores[:, :, -1], call) if plan.wants_logits else None
    return Attended(out.flatten(1, 2).to(call.q.dtype), lse, logits)


def _by_one_kernel(call: AttentionCall, keys: _Keys) -> torch.Tensor:
    """The output `[B, Hq, 1, Dv]` of a call that `one_token` serves."""
    hidden = None if keys.hidden is None else keys.hidden[:, :, 0]
    out = one_token.attend(call.q, keys.k, keys.v, call.scale, hidden)
    if keys.empty is not None:
        of_heads = keys.empty.repeat_interleave(out.shape[1] // keys.empty.shape[1], 1)
        out = out.masked_fill(of_heads[..., None], 0.0)
    return out


def _summed(weights: torch.Tensor, keys: _Keys) -> torch.Tensor:
    """Sum of the values by their weights, `[B * groups, queries, T]`."""
    begin, sums = 0, []
    for part in _parts(keys.v, keys.unreadable):
        end = begin + part.shape[1]
        sums.append(torch.bmm(weights[..., begin:end], part))
        begin = end
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _parts(x: torch.Tensor, silenced: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """Keys or values `[B, groups, T, D]` as float32 parts `[B * groups, n, D]` along T. Those `silenced` become 0.

    A part lives until the next one is asked for.
    """
    if silenced is None and (x.dtype == torch.float32 or not x.shape[2]):
        yield x.float().flatten(0, 1)
        return
    buffer = x.new_empty(*x.shape[:2], min(_CHUNK, x.shape[2]), x.shape[3], dtype=torch.float32)
    for begin in range(0, x.shape[2], _CHUNK):
        part = buffer[:, :, : min(_CHUNK, x.shape[2] - begin)]
        part.copy_(x[:, :, begin : begin + part.shape[2]])
        if silenced is not None:
            part.masked_fill_(silenced[..., begin : begin + part.shape[2], None], 0.0)
        yield part.flatten(0, 1)


def _keys(call: AttentionCall, plan: PagePlan) -> _Keys:
    """The keys that a plan reads."""
    kv_heads, all_real = call.k.shape[1], call.kv_start is None and call.kv_end is None
    if plan.pages is None or plan.counts is None:
        return _in_place(call, None) if all_real else _partly_in_place(call)
    named = max(kv_heads, plan.pages.shape[1]) * plan.pages.shape[2] * plan.page_size
    if all_real and named >= kv_heads * call.kv_length:
        return _in_place(call, plan)
    return _gathered(call, plan, plan.pages, plan.counts, whole=all_real and call.kv_length >= plan.page_size)


def _in_place(call: AttentionCall, plan: PagePlan | None) -> _Keys:
    """The keys of a call whose keys are all real. Those that are not in the lists are hidden."""
    hidden = empty = None
    if plan is not None and plan.pages is not None and plan.counts is not None:
        hidden, empty = _once(plan, ("unlisted", call.kv_length), lambda: _unlisted(plan, call.kv_length))
    if call.q.shape[2] > 1:
        position = torch.arange(call.kv_length, device=call.k.device).view(1, 1, -1)
        hidden = _later(call, position) if hidden is None else hidden | _later(call, position)
        empty = hidden.all(-1)
    return _Keys(call.k, call.v, hidden, empty)


def _once(plan: PagePlan, name: Hashable, make: Callable[[], T]) -> T:
    """What `make` returns, made once for all layers that read by a plan."""
    if torch.compiler.is_compiling():
        return make()
    if name not in plan.kept:
        plan.kept[name] = make()
    made: T = plan.kept[name]
    return made


def _unlisted(plan: PagePlan, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of `length` that no list names, and lists that are empty, as `_Keys.hidden` and `_Keys.empty`."""
    assert plan.pages is not None and plan.counts is not None
    unlisted = ~marked(plan.pages, plan.counts, plan.num_pages)
    of_tokens = unlisted[..., None].expand(*unlisted.shape, plan.page_size).flatten(-2)
    return of_tokens[:, :, None, :length], plan.counts[..., None] == 0


def _partly_in_place(call: AttentionCall) -> _Keys:
    """The keys of a call that has padding, or a buffer with a tail."""
    position = torch.arange(call.kv_length, device=call.k.device) - call.row_starts()[:, None, None]
    unreadable = (position < 0) | (position >= call.lengths()[:, None, None])
    hidden = unreadable[:, :, None] | _later(call, position)
    return _Keys(call.k, call.v, hidden, hidden.all(-1), unreadable)


def _later(call: AttentionCall, position: torch.Tensor) -> torch.Tensor:
    """Which keys at positions `[B, L, T]` within the row come after a query, bool `[B, L, Sq, T]`."""
    q_length = call.q.shape[2]
    query = torch.arange(q_length, device=position.device) + (call.lengths() - q_length)[:, None]
    return position[:, :, None] > query[:, None, :, None]


def _gathered(call: AttentionCall, plan: PagePlan, pages: torch.Tensor, counts: torch.Tensor, whole: bool) -> _Keys:
    """The keys of lists, copied.

    Args:
        call: the call.
        plan: its plan.
        pages: the plan's pages.
        counts: the plan's counts.
        whole: whether pages are copied whole. The last page of a row is then a window that ends with the row, of which
            the tokens before the page are hidden. All keys of the call must be real.
    """
    name = "slots", call.kv_length, call.q.shape[2], whole
    slot, hidden, empty, places = _once(plan, name, lambda: (*_slots(call, plan, pages, counts, whole), _Places()))
    k, v = _rows((call.k, call.v), slot, plan.page_size if whole else 1, places)
    return _Keys(k, v, hidden, empty)


def _slots(
    call: AttentionCall, plan: PagePlan, pages: torch.Tensor, counts: torch.Tensor, whole: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the listed keys lie, `[B, L, n]`, and `_Keys.hidden` and `_Keys.empty`; arguments as for `_gathered`."""
    page_size, tokens = plan.page_size, torch.arange(plan.page_size, device=pages.device)
    first, listed = pages.long() * page_size, leading(pages, counts)
    if whole:
        slot = first.clamp(0, call.kv_length - page_size)
        hidden = tokens < torch.where(listed, first - slot, page_size)[..., None]
    else:
        position, starts = first[..., None] + tokens, call.row_starts()[:, None, None, None]
        hidden = (position >= call.lengths()[:, None, None, None]) | ~listed[..., None]
        instead = torch.where(counts[..., None, None] > 0, position[:, :, :1, :1] + starts, 0)
        slot = torch.where(hidden, instead, position + starts).flatten(-2)
    hidden, empty = hidden.flatten(-2)[:, :, None], counts[..., None] == 0
    if call.q.shape[2] > 1:
        hidden = hidden | _later(call, ((slot if whole else first)[..., None] + tokens).flatten(-2))
        empty = hidden.all(-1)
    return slot, hidden, empty


def _rows(tensors: tuple[torch.Tensor, ...], slot: torch.Tensor, size: int, places: _Places) -> list[torch.Tensor]:
    """Windows of `size` tokens of tensors `[B, Hkv, S, D]` from slots `[B, L, n]` on: `[B, groups, n * size, D]` each.

    One `index_select` over a view in which each row is a window: it copies at the speed of memory. `places` keeps its
    indices, by where rows and heads lie, which is alike in keys and values and in most layers.
    """
    batch, kv_heads, length, _ = tensors[0].shape
    slot = slot.unflatten(1, (kv_heads, -1)) if slot.shape[1] >= kv_heads else slot[:, None]
    found = []
    for x in tensors:
        dim = x.shape[3]
        if x.stride(3) != 1 or x.stride(2) != dim or x.stride(0) % dim or x.stride(1) % dim:
            x = x.contiguous()
        strides = x.stride(0) // dim, x.stride(1) // dim  # in tokens
        key = kv_heads, *strides
        if key not in places:
            places[key] = _places(slot, batch, kv_heads, strides)
        place = places[key]
        windows = (batch - 1) * strides[0] + (kv_heads - 1) * strides[1] + length - size + 1
        rows = x.as_strided((windows, size * dim), (dim, 1)).index_select(0, place.flatten())
        found.append(rows.view(batch, place.shape[1] * place.shape[2], -1, dim))
    return found


def _places(slot: torch.Tensor, batch: int, kv_heads: int, strides: tuple[int, int]) -> torch.Tensor:
    """Where slots `[B, Hkv or 1, lists, n]` lie, counted from the first row's first head: `[B, Hkv, lists, n]`."""
    of_batch, of_head = strides
    place = slot + (torch.arange(kv_heads, device=slot.device) * of_head)[:, None, None]
    if batch > 1:
        place = place + (torch.arange(batch, device=slot.device) * of_batch)[:, None, None, None]
    return place


def _by_position(scores: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Scores `[B, Hq, S]` by key as scores by position within the row; undefined after the row's length."""
    if call.kv_start is None:
        return scores
    slots = torch.arange(scores.shape[-1], device=scores.device) + call.kv_start[:, None]
    return scores.gather(-1, slots.clamp(max=scores.shape[-1] - 1)[:, None].expand_as(scores))
