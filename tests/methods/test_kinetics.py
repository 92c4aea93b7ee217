"""Kinetics' block top-k against the oracle, and the state that it keeps from step to step."""

from dataclasses import replace

import pytest
import torch
from bound import bound
from calls import in_buffer, make_call
from decode_steps import decode_call, run
from oracles.decode import kinetics, logits_of

from sparse_patch.call import KVState
from sparse_patch.methods.kinetics import Kinetics

MARGIN = 1e-4


def build(**settings: object) -> Kinetics:
    return Kinetics(min_length=0, **settings)  # type: ignore[arg-type]


def tokens_of(mask: torch.Tensor, group: int) -> list[set[int]]:
    """The keys that each KV head reads; the heads of a group read the same keys."""
    per_group = mask[0, :, -1].unflatten(0, (-1, group))
    assert (per_group == per_group[:, :1]).all()
    return [set(head.nonzero().flatten().tolist()) for head in per_group[:, 0]]


@pytest.mark.parametrize("heads", [(8, 2), (3, 3), (7, 1)])
@pytest.mark.parametrize("block_size, sink", [(16, 4), (8, 4), (16, 0), (8, 5), (4, 16)])
def test_tokens_equal_the_oracle(heads: tuple[int, int], block_size: int, sink: int) -> None:
    compared = 0
    for number, length in enumerate([100, 101, 115, 116, 117, 230, 400]):
        blocks, window = [1, 2, 5][number % 3], [1, 20, 33][number // 2 % 3]
        method = build(budget=sink + window + blocks * block_size, block_size=block_size, sink=sink, window=window)
        if length <= method.budget:  # type: ignore[operator]
            continue
        call = decode_call(length, heads=heads, seed=number)
        z = logits_of(call.q[0, :, -1].numpy(), call.k[0].numpy(), call.scale)
        expected, margin = kinetics(z, heads[1], block_size, blocks, sink, window)
        if margin > MARGIN:
            assert tokens_of(run(method, call).mask, call.group_size) == expected, f"{length} tokens"
            compared += 1
    assert compared >= 3


def test_every_length_around_a_block() -> None:
    """Blocks begin after the sinks; the window takes what is left."""
    method = build(budget=4 + 20 + 3 * 16, window=20)
    for length in range(73, 73 + 40):
        call = decode_call(length, heads=(4, 2), seed=length)
        mask = run(method, call).mask[0, 0, 0]
        window = 20 + (length - 24) % 16
        assert mask[:4].all() and mask[-window:].all()
        inner = mask[4 : length - window].unflatten(0, (-1, 16))
        assert (inner.all(-1) == inner.any(-1)).all(), "half a block"
        assert inner.all(-1).sum() == min(3, len(inner))


def test_the_score_is_a_mean_of_logits_not_of_probabilities() -> None:
    """One token that takes all the probability does not save a block whose other tokens have low logits."""
    call = decode_call(200, heads=(1, 1))
    q, k = call.q, call.k
    q.zero_()
    k.zero_()
    q[..., 0] = 1.0
    k[:, :, 4 + 16 * 2, 0] = 40.0  # block 2: one high, the others low
    k[:, :, 4 + 16 * 2 + 1 : 4 + 16 * 3, 0] = -5.0
    k[:, :, 4 + 16 * 5 : 4 + 16 * 6, 0] = 1.0  # block 5: all a little above 0
    (tokens,) = tokens_of(run(build(budget=4 + 20 + 16, window=20), call).mask, 1)
    assert set(range(84, 100)) <= tokens and 36 not in tokens


def test_the_first_layer_is_dense() -> None:
    assert Kinetics().layers_of(4) == {1, 2, 3}


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("row_starts", [None, [0, 21]], ids=["plain", "padded"])
def test_what_is_kept_gives_the_lists_of_a_fresh_start(static: bool, row_starts: list[int] | None) -> None:
    """A prompt is followed by single tokens; the keys are the same in every step."""
    method, memory, length = build(budget=4 + 20 + 48, window=20), KVState(), 226
    whole = make_call(length, row_starts=row_starts)
    for end in (200, *range(201, length)):
        first = 0 if end == 200 else end - 1
        call = replace(whole, q=whole.q[:, :, first:end], k=whole.k[:, :, :end], v=whole.v[:, :, :end], q_start=first)
        if end == 200:
            bound(method).remember(replace(call, kv_state=memory))
            continue
        call = replace(call, phase="decode")
        fresh = run(method, call).mask
        kept = run(method, replace(in_buffer(call, length - end) if static else call, kv_state=memory)).mask
        assert torch.equal(kept[..., :end], fresh), f"{end} tokens"
