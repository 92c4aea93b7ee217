"""Every backend of attention by token blocks against the oracle, and the plan against its definition."""

from dataclasses import replace

import pytest
import torch
from builders.plans import random_token_blocks
from calls import make_call
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops.attention.token_blocks import attend, fastest, why_unsupported
from sparse_patch.ops.attention.token_blocks.triton import token_block_attention
from sparse_patch.plans import BLOCK_BITS, TokenBlockPlan, leading

FAST = ["torch", "triton"]
# Rounding of float32 logits of about 40, times values of 3; in half precision, of the output.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_matches(call: AttentionCall, plan: TokenBlockPlan, backend: str) -> None:
    expected, expected_lse, _ = attend(call, plan, "reference", return_lse=True)
    output, lse, _ = attend(call, plan, backend, return_lse=True)
    assert output.dtype == call.q.dtype and output.shape == expected.shape
    assert lse is not None and expected_lse is not None
    tolerance = TOLERANCE[call.q.dtype]
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3 if call.q.dtype == torch.bfloat16 else 2e-5, rtol=1e-5)
    assert attend(call, plan, backend)[1] is None


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("length", [1, 64, 65, 200])
def test_lengths(backend: str, length: int) -> None:
    call = make_call(length, heads=(4, 1))
    assert_matches(call, random_token_blocks(call), backend)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("heads, tile", [((2, 2), 8), ((4, 1), 8), ((7, 1), 8), ((16, 1), 4), ((20, 1), 2)], ids=str)
def test_groups_and_tiles(backend: str, heads: tuple[int, int], tile: int) -> None:
    call = make_call(260, queries=40, heads=heads)
    assert_matches(call, random_token_blocks(call, tile, init=2, local=1), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    "head_dim, value_dim, dtype",
    [(64, 64, torch.float16), (96, 64, torch.float32), (192, 128, torch.float16), (256, 256, torch.float32)],
    ids=str,
)
def test_head_dims_and_dtypes(backend: str, head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    call = make_call(200, queries=20, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    assert_matches(call, random_token_blocks(call), backend)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("queries, softcap", [(100, None), (51, 2.0), (1, None)], ids=str)
def test_padding_chunks_and_softcap(backend: str, queries: int, softcap: float | None) -> None:
    starts = [0, 37, 300, 330]
    call = make_call(330, queries=queries, row_starts=starts, softcap=softcap, heads=(2, 1))
    k, v = call.k.clone(), call.v.clone()
    for row, start in enumerate(starts):
        k[row, :, :start], v[row, :, :start] = torch.nan, torch.nan
    call = replace(call, k=k, v=v)
    plan = random_token_blocks(call, tile=8, dense=2)
    assert_matches(call, plan, backend)
    output, lse, _ = attend(call, plan, backend, return_lse=True)
    assert (output[3] == 0).all() and lse is not None and lse[3].isneginf().all()


@pytest.mark.parametrize("backend", FAST)
def test_any_strides(backend: str) -> None:
    call = make_call(200, queries=33, heads=(4, 2))
    plan = random_token_blocks(call)
    spread = replace(
        call, **{name: torch.stack([x := getattr(call, name), x * 0], -1)[..., 0] for name in ("q", "k", "v")}
    )
    assert torch.equal(attend(spread, plan, backend)[0], attend(call, plan, backend)[0])


@pytest.mark.parametrize("queries", [330, 130], ids=["whole", "chunk"])
def test_a_plan_says_what_it_reads(queries: int) -> None:
    """Lists, map, mask and counts of one plan agree with each other and with the rule."""
    call = make_call(330, queries=queries, row_starts=[0, 75], heads=(4, 2))
    plan = random_token_blocks(call, tile=4, init=1, local=1, dense=2, chance=0.3)
    mask, start = plan.mask(), [0, 75]
    assert torch.equal(plan.computed_pairs(), mask.sum((-1, -2)))
    assert 0 < plan.density().min() <= plan.density().max() < 1
    assert torch.equal(plan.pairs_by_head, plan.computed_pairs().sum(0))
    listed = leading(plan.entries, plan.counts)
    blocks = (plan.entries >> BLOCK_BITS).masked_fill(~listed, 1 << 20)
    assert (blocks.diff(dim=-1) > 0)[listed[..., 1:]].all(), "ascending, each once"
    assert (plan.entries & 15)[listed].all() and not (plan.entries >> 4 & 15)[listed].any()
    for row in range(2):
        for i in range(queries):
            position = 330 - queries + i - start[row]
            own = mask[row, 0, i, start[row] :]
            assert not mask[row, :, i, : start[row]].any()
            if position < 0:
                assert not own.any()
            elif position < 128:
                assert own[: position + 1].all() and not own[position + 1 :].any()
            else:
                in_any_case = [*range(64), *range(position // 64 * 64 - 64, position + 1)]
                assert own[in_any_case].all() and not own[position + 1 :].any()


def test_what_is_not_served() -> None:
    call = make_call(100, heads=(130, 2))
    plan = random_token_blocks(call, tile=4)
    assert why_unsupported(call, plan, "auto") is None and fastest(call, plan) == "torch"
    assert "65 query heads" in str(why_unsupported(call, plan, "triton"))
    negative = replace(make_call(100), scale=-1.0)
    with pytest.raises(UnsupportedCallError, match="not positive"):
        attend(negative, random_token_blocks(negative), "triton")


def test_the_operator_has_a_fake() -> None:
    with FakeTensorMode():
        q, k = torch.empty(2, 8, 100, 64), torch.empty(2, 2, 100, 64)
        lists = torch.empty(2, 2, 32, 2, dtype=torch.int32), torch.empty(2, 2, 32, dtype=torch.int32)
        output, lse = token_block_attention(q, k, k, *lists, None, 1.0, 0.0, 64, 4, 1, 1, 0, 0, True)
        assert output.shape == q.shape and lse.shape == q.shape[:3]
