"""A-shape and tri-shape against the slow oracle."""

import pytest
import torch
from bound import bound
from calls import make_call
from oracles.minference import a_shape_mask

from sparse_patch.methods.a_shape import AShape
from sparse_patch.plans import BlockPlan, Dense


@pytest.mark.parametrize("sink, window", [(0, 1), (1, 1), (16, 16), (17, 17), (20, 50), (64, 33), (130, 1)])
@pytest.mark.parametrize("last", [0, 1, 40])
@pytest.mark.parametrize("queries", [None, 83])
def test_the_plan_equals_the_oracle(sink: int, window: int, last: int, queries: int | None) -> None:
    call = make_call(200 - last % 2, queries=queries)
    plan = bound(AShape(sink=sink, window=window, last=last, block_size=16, min_length=0)).plan(call)
    assert isinstance(plan, BlockPlan) and plan.columns is None
    expected = torch.from_numpy(a_shape_mask(call.q.shape[2], call.kv_length, sink, window, last, 16))
    assert torch.equal(plan.mask()[0], expected.expand(4, -1, -1))
    i, j = torch.arange(call.q_start, call.kv_length)[:, None], torch.arange(call.kv_length)
    wanted = ((i - j < window) | (j < sink) | (i >= call.kv_length - last)) & (j <= i)
    assert (plan.mask()[0] | ~wanted).all()


def test_dense_at_and_sparse_above_sink_and_window() -> None:
    method = AShape(sink=48, window=100, block_size=16, min_length=0)
    assert isinstance(bound(method).plan(make_call(148)), Dense)
    assert isinstance(bound(method).plan(make_call(200)), BlockPlan)
    assert isinstance(bound(AShape(sink=8, window=8, last=60, min_length=0)).plan(make_call(200, queries=60)), Dense)
