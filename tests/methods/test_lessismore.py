"""LessIsMore against the oracle."""

import math

import pytest
from decode_steps import decode_call, forward, lists_of
from oracles.decode import lessismore, logits_of

from sparse_patch.artefacts.layer_roles import Roles
from sparse_patch.methods.lessismore import LessIsMore
from sparse_patch.model_shape import ModelShape

MARGIN = 1e-6
SHAPE = ModelShape("llama", num_layers=6, num_heads=8, num_kv_heads=2, hidden_size=64)


def build(**settings: object) -> LessIsMore:
    roles = Roles(full=[0, 1], select=[2, 4])
    return LessIsMore(roles=roles, min_length=0, **settings).bind(SHAPE)  # type: ignore[arg-type]


@pytest.mark.parametrize("recency", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (7, 1)])
def test_lists_equal_the_oracle(recency: float, sinks: int, heads: tuple[int, int]) -> None:
    compared = 0
    for number, (length, budget) in enumerate([(20, 16), (100, 15), (130, 40), (257, 64), (300, 299)]):
        method = build(budget=budget, recency=recency, sink=sinks)
        calls = [decode_call(length, layer=layer, heads=heads, seed=number) for layer in (2, 3, 4, 5)]
        steps = forward(method, calls)
        for source, reader in ((0, 1), (2, 3)):
            call = calls[source]
            z = logits_of(call.q[0, :, -1].numpy(), call.k[0].numpy(), call.scale)
            expected, margin = lessismore(z, budget, recency, sinks)
            (tokens,) = lists_of(steps[reader].plan)
            assert len(tokens) == budget
            assert tokens >= {*range(sinks), *range(length - math.ceil(recency * budget), length)}
            if margin > MARGIN:
                assert [tokens] == expected
                compared += 1
    assert compared >= 6


def test_the_first_choice_of_every_head_is_read() -> None:
    """Without recency and sinks the budget has as many tokens as there are heads."""
    heads, sinks = 8, 4
    budget = 16  # 4 recent, 4 sinks, 8 by rank
    for seed in range(20):
        calls = [decode_call(300, layer=layer, heads=(heads, 2), seed=seed) for layer in (2, 3)]
        (tokens,) = lists_of(forward(build(budget=budget, sink=sinks), calls)[1].plan)
        z = logits_of(calls[0].q[0, :, -1].numpy(), calls[0].k[0].numpy(), calls[0].scale)
        assert {int(best) for best in z[:, :-4].argmax(-1)} <= tokens
