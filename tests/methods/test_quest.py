"""Quest against the oracle, its bound, and the state that it keeps from step to step."""

import math
from dataclasses import replace

import pytest
import torch
from bound import bound
from calls import in_buffer, make_call
from decode_steps import decode_call, forward, lists_of, run
from oracles.decode import logits_of, quest, quest_bounds

from sparse_patch.call import KVState
from sparse_patch.methods.quest import Quest
from sparse_patch.plans import PagePlan

MARGIN = 1e-5


def build(**settings: object) -> Quest:
    return Quest(min_length=0, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("current_page", ["forced", "scored", "added"])
@pytest.mark.parametrize("group_score", [None, "sum", "max"])
@pytest.mark.parametrize("heads", [(8, 2), (3, 3), (7, 1)])
def test_lists_equal_the_oracle(current_page: str, group_score: str | None, heads: tuple[int, int]) -> None:
    compared = 0
    for number, (length, budget, page) in enumerate([(49, 48, 16), (130, 24, 8), (257, 64, 16), (256, 96, 32)]):
        sharing = {} if group_score is None else {"index_sharing": "kv_group", "group_score": group_score}
        method = build(budget=budget, page_size=page, current_page=current_page, **sharing)
        call = decode_call(length, layer=2, heads=heads, seed=number)
        q, k = call.q[0, :, -1].numpy(), call.k[0].numpy()
        expected, margin = quest(q, k, page, math.ceil(budget / page), current_page, group_score)
        lists = lists_of(run(method, call).plan)
        assert len(lists) == (heads[0] if group_score is None else heads[1])
        if margin > MARGIN:
            assert lists == expected
            compared += 1
    assert compared >= 2


def test_the_bound_is_a_bound() -> None:
    for seed in range(5):
        call = decode_call(100, heads=(8, 2), seed=seed)
        q, k = call.q[0, :, -1].numpy(), call.k[0].numpy()
        bounds, z = quest_bounds(q, k, 16), logits_of(q, k, 1.0)
        for page in range(bounds.shape[1]):
            assert (bounds[:, page] >= z[:, page * 16 : page * 16 + 16].max(-1) - 1e-3).all()


def test_the_current_page_is_left_out_where_nothing_forces_it() -> None:
    call = decode_call(200, layer=2)
    call.k[:, :, 192:] = 0  # a bound of 0
    masks = {
        variant: run(build(budget=96, current_page=variant), call).mask for variant in ("forced", "scored", "added")
    }
    assert not masks["scored"][..., 192:].any()
    assert masks["forced"][..., 192:].all() and masks["added"][..., 192:].all()
    assert [int(masks[name][0, 0].sum()) for name in masks] == [5 * 16 + 8, 6 * 16, 6 * 16 + 8]


def test_the_first_two_layers_are_dense() -> None:
    assert Quest().layers_of(6) == {2, 3, 4, 5}


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("row_starts", [None, [0, 21]], ids=["plain", "padded"])
def test_what_is_kept_gives_the_lists_of_a_fresh_start(static: bool, row_starts: list[int] | None) -> None:
    """A prompt is followed by single tokens; the keys are the same in every step."""
    method, memory, length = build(budget=48), KVState(), 226
    whole = make_call(length, row_starts=row_starts)
    for end in (200, *range(201, length)):
        first = 0 if end == 200 else end - 1
        call = replace(whole, q=whole.q[:, :, first:end], k=whole.k[:, :, :end], v=whole.v[:, :, :end], q_start=first)
        if end == 200:
            bound(method).remember(replace(call, kv_state=memory))
            continue
        call = replace(call, phase="decode")
        fresh = run(method, call).plan
        kept = run(method, replace(in_buffer(call, length - end) if static else call, kv_state=memory)).plan
        for row in range(len(whole.k)):
            assert lists_of(kept, row) == lists_of(fresh, row), f"{end} tokens"


def test_bounds_are_brought_up_to_date_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    import sparse_patch.methods.quest as module

    times, original = [], module.page_bounds
    monkeypatch.setattr(module, "page_bounds", lambda *arguments: times.append(1) or original(*arguments))
    call = replace(decode_call(300), kv_state=KVState())
    assert isinstance(run(build(budget=48), call).plan, PagePlan)
    assert len(times) == 1 and not call.forward_state


def test_layers_of_a_forward_do_not_share_bounds() -> None:
    calls = [replace(decode_call(300, layer=layer), kv_state=KVState()) for layer in (2, 3)]
    together = forward(build(budget=48), calls)
    for step, call in zip(together, calls, strict=True):
        assert torch.equal(step.mask, run(build(budget=48), replace(call, kv_state=None)).mask)
