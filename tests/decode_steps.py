"""Decode calls made by hand, and a reference for the hook's part: remember, plan, attend, select."""

from dataclasses import dataclass, replace

import torch
from bound import bound
from calls import make_call, row_alone

from sparse_patch.call import AttentionCall, ForwardState, KVState, apply_softcap
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.methods.base.settings import Method
from sparse_patch.plans import Dense, PagePlan


@dataclass(frozen=True)
class Step:
    """The result of one layer.

    Attributes:
        call: the layer's call.
        plan: the method's plan.
        mask: the keys that were read, bool `[B, Hq, Sq, capacity]`.
        output: `[B, Hq, Sq, Dv]`.
    """

    call: AttentionCall
    plan: PagePlan | Dense
    mask: torch.Tensor
    output: torch.Tensor


def decode_call(length: int, *, layer: int = 0, queries: int = 1, **settings: object) -> AttentionCall:
    """The last tokens of `make_call` as a decode call; layers differ."""
    seed = 1000 * int(settings.pop("seed", 0)) + layer  # type: ignore[call-overload]
    call = make_call(length, queries=queries, seed=seed, **settings)  # type: ignore[arg-type]
    return replace(call, phase="decode", layer=layer)


def forward(method: Method | BoundMethod, calls: list[AttentionCall]) -> list[Step]:
    """Run the calls of one forward, layer by layer."""
    forward_state: ForwardState = {}
    return [run(method, replace(call, forward_state=forward_state)) for call in calls]


def forward_of_row(method: Method | BoundMethod, calls: list[AttentionCall], row: int) -> list[Step]:
    """The same for one row of padded calls by itself."""
    return forward(method, [row_alone(call, row)[0] for call in calls])


def run(method: Method | BoundMethod, call: AttentionCall) -> Step:
    """Run one call as the hook does."""
    method = bound(method)
    method.remember(call)
    plan = method.plan(call)
    assert isinstance(plan, PagePlan | Dense)
    mask = (PagePlan.every(call) if isinstance(plan, Dense) else plan).mask()
    output, logits, lse = _attend(call, mask)
    if isinstance(plan, PagePlan) and plan.wants_logits:
        method.select(call, logits, lse)
    return Step(call, plan, mask, output)


def _attend(call: AttentionCall, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, the last query's float32 logits by position in the row (NaN beyond its length), and its LSE."""
    k, v = (part.double().nan_to_num(0).repeat_interleave(call.group_size, 1) for part in (call.k, call.v))
    z = apply_softcap(call.q.double() @ k.transpose(-1, -2) * call.scale, call.softcap)
    z = z.masked_fill(~mask, -torch.inf)
    last = z[:, :, -1]
    position = torch.arange(call.kv_length)
    index = (position + call.row_starts()[:, None]).clamp(max=call.kv_length - 1)[:, None].expand_as(last)
    by_position = last.gather(-1, index).masked_fill((position >= call.lengths()[:, None])[:, None], torch.nan)
    return (z.softmax(-1) @ v).to(call.q.dtype), by_position.float(), last.logsumexp(-1).float()


def lists_of(plan: PagePlan | Dense, row: int = 0) -> list[set[int]]:
    """The pages of each list of a row."""
    assert isinstance(plan, PagePlan) and plan.pages is not None and plan.counts is not None
    lists = [plan.pages[row, i, :number].tolist() for i, number in enumerate(plan.counts[row].tolist())]
    assert all(len(pages) == len(set(pages)) for pages in lists), "a page is listed twice"
    assert all(0 <= page < plan.num_pages for pages in lists for page in pages)
    return [set(pages) for pages in lists]


def with_state(call: AttentionCall, kv_state: KVState) -> AttentionCall:
    return replace(call, kv_state=kv_state)
