"""TidalDecode against the oracle."""

import pytest
import torch
from decode_steps import decode_call, forward, lists_of
from oracles.decode import logits_of, tidaldecode

from sparse_patch.artefacts.layer_roles import Roles
from sparse_patch.methods.tidaldecode import TidalDecode
from sparse_patch.model_shape import ModelShape

MARGIN = 1e-6
SHAPE = ModelShape("llama", num_layers=6, num_heads=8, num_kv_heads=2, hidden_size=64)


def build(**settings: object) -> TidalDecode:
    roles = Roles(full=[0, 1], select=[2, 4])
    return TidalDecode(roles=roles, min_length=0, **settings).bind(SHAPE)  # type: ignore[arg-type]


@pytest.mark.parametrize("sharing", ["q_head", "kv_group", "all"])
@pytest.mark.parametrize("force_current", [True, False])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (7, 1)])
def test_lists_equal_the_oracle(sharing: str, force_current: bool, heads: tuple[int, int]) -> None:
    """The lists of both selecting layers come from their own logits, and the layers after them use exactly these."""
    compared = 0
    for number, (length, budget) in enumerate([(17, 16), (100, 1), (130, 17), (257, 64), (300, 299)]):
        method = build(budget=budget, force_current=force_current, index_sharing=sharing)
        softcap = [None, 5.0][number % 2]
        calls = [decode_call(length, layer=layer, heads=heads, seed=number, softcap=softcap) for layer in range(2, 6)]
        steps = forward(method, calls)
        for source, reader in ((0, 1), (2, 3)):
            call = calls[source]
            z = logits_of(call.q[0, :, -1].numpy(), call.k[0].numpy(), call.scale, softcap)
            expected, margin = tidaldecode(z, heads[1], budget, force_current, sharing)
            if margin > MARGIN:
                assert lists_of(steps[reader].plan) == expected
                compared += 1
    assert compared >= 8


def test_the_current_token_is_left_out_where_nothing_forces_it() -> None:
    calls = [decode_call(200, layer=layer) for layer in (2, 3)]
    calls[0].k[:, :, -1] = -calls[0].q[:, ::2, -1]  # nobody asks for it
    forced, free = (forward(build(budget=32, force_current=force), calls)[1] for force in (True, False))
    assert forced.mask[..., -1].all() and not free.mask[..., -1].any()
    assert (forced.mask.sum(-1) == 32).all() and (free.mask.sum(-1) == 32).all()


def test_heads_that_share_a_list_read_what_the_most_certain_of_them_want() -> None:
    """Sharing is by probability: a head with large but equal logits does not outweigh one that is sure of a token."""
    calls = [decode_call(200, layer=layer, heads=(2, 1)) for layer in (2, 3)]
    q, k = calls[0].q, calls[0].k
    k.zero_()
    k[..., 0] = 1 + 0.001 * torch.arange(200)
    k[:, :, 50, 1] = 1.0
    q.zero_()
    q[:, 0, :, 0] = 400.0  # large logits, rising slowly
    q[:, 1, :, 1] = 100.0  # one token alone
    for sharing in ("kv_group", "all"):
        step = forward(build(budget=8, index_sharing=sharing), calls)[1]
        assert step.mask[..., 50].all(), sharing
    z = logits_of(q[0, :, -1].numpy(), k[0].numpy(), calls[0].scale)
    assert z[:, 50].max() < sorted(z.max(0))[-8], "by logits it would not be among them"
