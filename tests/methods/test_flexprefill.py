"""FlexPrefill against the slow oracle, and FlexPrefill's own promises."""

import itertools

import pytest
import torch
from bound import bound
from calls import lengths_to_test, make_call
from oracles.flexprefill import FlexPrefillSettings, boundary_margins, flexprefill_blocks

from sparse_patch.call import AttentionCall
from sparse_patch.methods.flexprefill import FlexPrefill
from sparse_patch.plans import BlockGrid, BlockPlan

# Float32 sums and the oracle's float64 ones may fall on different sides of a threshold that is closer than this.
MARGIN = 1e-5


def compare_with_oracle(method: FlexPrefill, call: AttentionCall) -> tuple[int, int]:
    """Assert equality unless a decision is within rounding of its threshold: `(rows compared, rows in doubt)`."""
    settings = FlexPrefillSettings(
        method.gamma, method.tau, method.min_budget, method.max_budget, method.block_size, method.selection
    )
    q, k = call.q[0].double().numpy(), call.k[0].double().numpy()
    expected = torch.from_numpy(flexprefill_blocks(q, k, call.scale, settings, call.softcap))
    plan = bound(method).plan(call)
    if not isinstance(plan, BlockPlan):
        causal = BlockGrid.of(call, method.block_size).causal[0]
        assert torch.equal(expected, causal.expand_as(expected)), "dense where the oracle is sparse"
        return expected.shape[0] * expected.shape[1], 0
    clear = torch.from_numpy(boundary_margins(q, k, call.scale, settings, call.softcap) > MARGIN)
    blocks = plan.blocks()[0]
    assert blocks.shape == expected.shape
    wrong = (blocks != expected).any(-1) & clear
    assert not wrong.any(), f"head, query block: {wrong.nonzero().tolist()[:5]}"
    return int(clear.sum()), int((~clear).sum())


@pytest.mark.parametrize("selection", ["reference", "coverage"])
def test_the_plan_equals_the_oracle_at_every_length(selection: str) -> None:
    compared = in_doubt = 0
    for number, length in enumerate(lengths_to_test(16)):
        heads = [(1, 1), (4, 1), (4, 4), (7, 1), (8, 2), (14, 2)][number % 6]
        method = FlexPrefill(
            gamma=[0.6, 0.9, 0.97][number % 3],
            tau=[0.0, 0.1, 0.3][number // 3 % 3],
            min_budget=[1, 16, 40][number // 9 % 3],
            max_budget=[None, 64][number // 2 % 2],
            block_size=16,
            min_length=0,
            selection=selection,
        )
        call = make_call(length, heads=heads, seed=number, softcap=[None, 5.0][number % 2])
        done, doubtful = compare_with_oracle(method, call)
        compared, in_doubt = compared + done, in_doubt + doubtful
    assert in_doubt < 0.02 * compared


@pytest.mark.parametrize("selection", ["reference", "coverage"])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_chunks_equal_the_oracle(selection: str, block_size: int) -> None:
    compared = 0
    for number, (length, queries) in enumerate(itertools.product((700, 769), (150, 333, 512))):
        method = FlexPrefill(
            gamma=0.8, tau=0.2, min_budget=block_size, block_size=block_size, min_length=0, selection=selection
        )
        compared += compare_with_oracle(method, make_call(length, queries=queries, heads=(4, 2), seed=number))[0]
    assert compared > 20


@pytest.mark.parametrize("selection", ["reference", "coverage"])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (7, 1)])
def test_the_plan_equals_the_oracle_at_4096(selection: str, heads: tuple[int, int]) -> None:
    method = FlexPrefill(min_length=0, min_budget=256, gamma=0.9, tau=0.1, selection=selection)
    call = make_call(4096, heads=heads, head_dim=32)
    plan = bound(method).plan(call)
    assert isinstance(plan, BlockPlan) and plan.density().mean() < 0.95
    compared, in_doubt = compare_with_oracle(method, call)
    assert in_doubt <= 4096 // 128  # at most one head is within rounding of a threshold
    assert compared + in_doubt == heads[0] * 32


def test_the_head_switch_takes_both_sides() -> None:
    """Guards the tests above: their calls have query-aware and vertical-slash heads, and both kinds change the plan."""
    call = make_call(400, heads=(8, 2))
    plans = [
        bound(FlexPrefill(gamma=0.7, tau=tau, min_budget=16, block_size=16, min_length=0)).plan(call).blocks()  # type: ignore[union-attr]
        for tau in (0.0, 0.25, 1.0)
    ]
    changed = [(plans[0] != plan).any(-1).any(-1).sum().item() for plan in plans]
    assert 0 < changed[1] < changed[2]


@pytest.mark.parametrize("selection", ["reference", "coverage"])
def test_every_row_keeps_block_0_and_its_diagonal(selection: str) -> None:
    call = make_call(500, queries=300)
    plan = bound(FlexPrefill(gamma=0.05, min_budget=0, block_size=16, min_length=0, selection=selection)).plan(call)
    assert isinstance(plan, BlockPlan)
    blocks = plan.blocks()
    assert blocks[..., 0].all()
    diagonal = plan.grid.query_block_ids[:, None, :, None].expand(*blocks.shape[:-1], 1)
    assert blocks.gather(-1, diagonal).all()


@pytest.mark.parametrize("selection", ["reference", "coverage"])
def test_plans_are_nested_in_gamma(selection: str) -> None:
    call = make_call(1200, sharpness=0.4)
    previous = None
    for gamma in (0.3, 0.6, 0.9, 0.99):
        plan = bound(
            FlexPrefill(gamma=gamma, tau=0.2, min_budget=16, block_size=16, min_length=0, selection=selection)
        ).plan(call)
        assert isinstance(plan, BlockPlan)
        blocks = plan.blocks()
        if previous is not None:
            assert (blocks | ~previous).all()
            assert (blocks != previous).any()
        previous = blocks


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_coverage_keeps_the_mass_of_the_last_queries(gamma: float) -> None:
    """`coverage` keeps at least gamma of the last block's attention; `reference` does not."""
    kept = {}
    call = make_call(1024, heads=(8, 8), sharpness=0.6)
    logits = call.q.float() @ call.k.float().transpose(-1, -2) * call.scale
    causal = torch.ones(1024, 1024, dtype=torch.bool).tril()
    attention = logits.masked_fill(~causal, -torch.inf).softmax(-1)
    for selection in ("reference", "coverage"):
        plan = bound(
            FlexPrefill(gamma=gamma, tau=0.0, min_budget=16, block_size=16, min_length=0, selection=selection)
        ).plan(call)
        assert isinstance(plan, BlockPlan)
        kept[selection] = (attention * plan.mask())[:, :, -16:].sum(-1).mean(-1).min().item()
    assert kept["coverage"] >= gamma
    assert kept["reference"] < kept["coverage"]


def test_softcap_and_scale_reach_the_selection() -> None:
    call = make_call(500, sharpness=3.0)
    method = FlexPrefill(gamma=0.9, min_budget=16, block_size=16, min_length=0, selection="coverage")
    base = bound(method).plan(call).blocks()  # type: ignore[union-attr]
    for change in ({"softcap": 0.5}, {"scale": 0.01}):
        changed = bound(method).plan(AttentionCall(**{**vars(call), **change})).blocks()  # type: ignore[union-attr]
        assert (changed != base).any()


def test_max_budget_limits_and_min_budget_raises() -> None:
    call = make_call(800)
    common = {"gamma": 0.95, "tau": 0.0, "block_size": 16, "min_length": 0, "selection": "coverage"}
    densities = [
        bound(FlexPrefill(**common, **budgets)).plan(call).density().mean()  # type: ignore[union-attr, arg-type]
        for budgets in ({"min_budget": 16, "max_budget": 32}, {"min_budget": 16}, {"min_budget": 600})
    ]
    assert densities[0] < densities[1] < densities[2]
