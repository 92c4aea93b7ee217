"""DELTA against the oracle."""

import math

import pytest
import torch
from decode_steps import decode_call, forward, lists_of
from oracles.decode import delta, logits_of

from sparse_patch.artefacts.layer_roles import Roles
from sparse_patch.call import AttentionCall
from sparse_patch.methods.delta import Delta
from sparse_patch.model_shape import ModelShape

MARGIN = 1e-5
SHAPE = ModelShape("llama", num_layers=6, num_heads=8, num_kv_heads=2, hidden_size=64)


def build(**settings: object) -> Delta:
    roles = Roles(full=[0, 1, 2, 4])
    return Delta(roles=roles, min_length=0, **settings).bind(SHAPE)  # type: ignore[arg-type]


def logits(call: AttentionCall) -> torch.Tensor:
    return torch.from_numpy(logits_of(call.q[0, :, -1].numpy(), call.k[0].numpy(), call.scale, call.softcap))


@pytest.mark.parametrize("page_size", [1, 8, 16, 64])
@pytest.mark.parametrize("position_bias", [0.0, 1e-7, 1e-3])
def test_lists_equal_the_oracle(page_size: int, position_bias: float) -> None:
    compared = 0
    for number, heads in enumerate([(8, 2), (4, 4), (7, 1)]):
        for length, budget, recency_pages in [(page_size * 5 + 1, 2, 1), (700, 4, 3), (705, 8, 1), (720, 11, 10)]:
            budget = min(budget * page_size, length - 1)
            recency_pages = min(recency_pages, budget // page_size)
            if recency_pages == 0:
                continue
            method = build(budget=budget, page_size=page_size, recency_pages=recency_pages, position_bias=position_bias)
            calls = [decode_call(length, layer=layer, heads=heads, seed=number) for layer in (2, 3, 4, 5)]
            steps = forward(method, calls)
            for source, reader in ((0, 1), (2, 3)):
                number_of_pages = math.ceil(budget / page_size)
                z = logits(calls[source]).numpy()
                expected, margin = delta(z, page_size, number_of_pages, recency_pages, position_bias)
                (pages,) = lists_of(steps[reader].plan)
                have = math.ceil(length / page_size)
                assert len(pages) == min(number_of_pages, have)
                assert pages >= set(range(have - recency_pages, have)), "the last pages are missing"
                if margin > MARGIN:
                    assert [pages] == expected
                    compared += 1
    assert compared >= 10


def test_the_score_is_the_sum_of_the_maxima_over_all_heads() -> None:
    """Two heads want different tokens of a page: together they outweigh a page that one head wants more."""
    calls = [decode_call(96, layer=layer, heads=(2, 1), head_dim=16) for layer in (2, 3)]
    q, k = calls[0].q, calls[0].k
    q.zero_()
    k.zero_()
    q[:, 0, -1, 0] = q[:, 1, -1, 1] = 10 / calls[0].scale
    wanted = torch.full((2, 96), 1e-6)
    wanted[0, [20, 40, 5]] = torch.tensor([0.5, 0.4, 0.1])
    wanted[1, [41, 4, 90]] = torch.tensor([0.4, 0.3, 0.3])
    k[0, 0, :, :2] = wanted.log().T / 10
    pages = logits(calls[0]).softmax(-1).unflatten(-1, (-1, 16))
    assert pages.sum(-1).amax(0).argmax() == 1 and pages.amax(0).sum(-1).argmax() == 2, "the two rules differ"
    step = forward(build(budget=32, recency_pages=1), calls)[1]
    assert lists_of(step.plan) == [{2, 5}]


def test_the_bias_of_the_public_code_moves_the_choice_to_earlier_pages() -> None:
    calls = [decode_call(6400, layer=layer, sharpness=0.05) for layer in (2, 3)]
    free, biased = (forward(build(budget=1600, position_bias=bias), calls)[1] for bias in (0.0, 1e-4))
    (pages_free,), (pages_biased,) = lists_of(free.plan), lists_of(biased.plan)
    assert sum(pages_biased) < sum(pages_free)


def test_the_choice_changes_from_step_to_step() -> None:
    lists = [
        lists_of(forward(build(budget=160), [decode_call(n, layer=layer, seed=n) for layer in (2, 3)])[1].plan)
        for n in (500, 501)
    ]
    assert lists[0] != lists[1]


def test_a_budget_is_rounded_up_to_pages() -> None:
    calls = [decode_call(400, layer=layer) for layer in (2, 3)]
    lengths = [len(lists_of(forward(build(budget=budget), calls)[1].plan)[0]) for budget in (160, 161, 176)]
    assert lengths == [10, 11, 11]
