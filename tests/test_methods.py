"""Properties of every prefill method, whatever it selects."""

import pytest
import torch
from bound import bound
from calls import make_call
from method_table import PREFILL_METHODS, SPAN_METHODS, TOKEN_METHODS, MethodCase

from sparse_patch.call import AttentionCall
from sparse_patch.methods.base.registry import registry
from sparse_patch.methods.base.settings import Method
from sparse_patch.ops.attention import block_sparse, token_blocks
from sparse_patch.plans import BlockPlan, Dense, TokenBlockPlan

CASES = pytest.mark.parametrize("case", PREFILL_METHODS, ids=lambda case: case.name)
ALL = pytest.mark.parametrize("case", [*PREFILL_METHODS, *TOKEN_METHODS], ids=lambda case: case.name)


def build(settings: dict[str, object]) -> Method:
    return registry()[str(settings["method"])].model_validate(settings)


def any_plan_of(case: MethodCase, call: AttentionCall) -> BlockPlan | TokenBlockPlan:
    plan = bound(build(case.small)).plan(call)
    assert isinstance(plan, BlockPlan | TokenBlockPlan)
    return plan


def attend(call: AttentionCall, plan: BlockPlan | TokenBlockPlan) -> torch.Tensor:
    if isinstance(plan, TokenBlockPlan):
        return token_blocks.attend(call, plan)[0]
    return block_sparse.attend(call, plan)[0]


def plan_of(case: MethodCase, call: object) -> BlockPlan:
    plan = bound(build(case.small)).plan(call)  # type: ignore[arg-type]
    assert isinstance(plan, BlockPlan)
    return plan


def columns_of(plan: BlockPlan, head: int, row: int) -> list[int]:
    if plan.columns is None or plan.column_counts is None:
        return []
    columns: list[int] = plan.columns[0, head, row, : plan.column_counts[0, head, row]].tolist()
    return columns


def test_every_prefill_method_is_in_the_table() -> None:
    sparse = {name for name, method in registry().items() if "prefill" in method.phases and name != "dense"}
    assert {case.small["method"] for case in (*PREFILL_METHODS, *SPAN_METHODS, *TOKEN_METHODS)} == sparse


@CASES
@pytest.mark.parametrize("queries", [400, 150], ids=["whole", "chunk"])
def test_lists_are_causal_ascending_and_sparse(case: MethodCase, queries: int) -> None:
    plan = plan_of(case, make_call(400, queries=queries))
    diagonal = plan.grid.query_block_ids
    for row in range(plan.counts.shape[2]):
        for head in range(plan.counts.shape[1]):
            blocks = plan.indices[0, head, row, : plan.counts[0, head, row]].tolist()
            assert blocks == sorted(set(blocks)), "a key block is listed twice or out of order"
            assert blocks[-1] == diagonal[0, row], "the diagonal is missing"
            columns = columns_of(plan, head, row)
            assert len(columns) == len(set(columns)), "a column is listed twice"
            assert all(0 <= key < diagonal[0, row] * plan.grid.block_size for key in columns), "not before the block"
            assert not {key // plan.grid.block_size for key in columns} & set(blocks), "a key is read twice"
    assert 0 < plan.density().min() <= plan.density().mean() < 1


@CASES
def test_heads_are_independent(case: MethodCase) -> None:
    call = make_call(400, heads=(6, 6))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = type(call)(**{**vars(call), "q": call.q[:, order], "k": call.k[:, order], "v": call.v[:, order]})
    assert torch.equal(plan_of(case, call).blocks()[:, order], plan_of(case, shuffled).blocks())
    assert torch.equal(plan_of(case, call).mask()[:, order], plan_of(case, shuffled).mask())


@CASES
@pytest.mark.parametrize("group", [1, 4, 7])
def test_grouped_heads_equal_repeated_ones(case: MethodCase, group: int) -> None:
    call = make_call(300, heads=(2 * group, 2))
    repeated = type(call)(
        **{**vars(call), "k": call.k.repeat_interleave(group, 1), "v": call.v.repeat_interleave(group, 1)}
    )
    assert torch.equal(plan_of(case, call).blocks(), plan_of(case, repeated).blocks())
    assert torch.equal(plan_of(case, call).mask(), plan_of(case, repeated).mask())


@ALL
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_short_calls_are_dense(case: MethodCase, length: int) -> None:
    plan = bound(build({**case.small, "min_length": 64})).plan(make_call(length))
    assert isinstance(plan, Dense) and "min_length" in plan.reason
