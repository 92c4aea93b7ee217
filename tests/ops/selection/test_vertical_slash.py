"""Plans from lines and pooled attention: the kernels against PyTorch, and both against their definition."""

import pytest
import torch
from calls import make_call

from sparse_patch.ops.selection.block_means import key_means
from sparse_patch.ops.selection.vertical_slash import QueryAware, VerticalSlashParams
from sparse_patch.ops.selection.vertical_slash import torch as in_torch
from sparse_patch.ops.selection.vertical_slash import triton as in_triton
from sparse_patch.ops.selection.vertical_slash.triton import cut
from sparse_patch.plans import BlockGrid


@pytest.mark.parametrize("backend", [in_torch, in_triton], ids=["torch", "triton"])
def test_tokens_within(backend: object) -> None:
    mass = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])
    for gamma, expected in ((0.75, [3, 4, 1]), (0.7, [2, 3, 1]), (0.2, [1, 1, 1])):
        assert backend.tokens_within(mass, gamma).tolist() == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize("length", [1, 100, 5000])
def test_tokens_within_agrees_with_a_sort(length: int) -> None:
    mass = torch.rand(2, 3, length).pow(8)
    mass = mass / mass.sum(-1, keepdim=True)
    for gamma in (0.3, 0.9, 0.99):
        difference = in_triton.tokens_within(mass, gamma) - in_torch.tokens_within(mass, gamma)
        assert difference.abs().max() <= 1, "sums round in another order"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "each_row, max_blocks, queries, row_starts, softcap, held",
    [
        (False, None, 200, None, None, 1),
        (False, None, 130, [0, 30], 4.0, 2**20),
        (True, None, 130, [0, 30], None, 2**20),
        (True, 3, 200, None, 4.0, 1),
    ],
)
def test_kernels_make_the_plan_of_pytorch(
    monkeypatch: pytest.MonkeyPatch,
    each_row: bool,
    max_blocks: int | None,
    queries: int,
    row_starts: list[int] | None,
    softcap: float | None,
    held: int,
) -> None:
    monkeypatch.setattr(cut, "_SLICE_BYTES", held)
    call = make_call(200, queries=queries, row_starts=row_starts, heads=(4, 2), softcap=softcap, head_dim=24)
    grid = BlockGrid.of(call, 16)
    shape = (call.q.shape[0], 4, grid.num_key_blocks)
    verticals, slashes = torch.rand(shape) < 0.1, torch.rand(shape) < 0.1
    aware = QueryAware(
        heads=torch.rand(shape[:2]) < 0.6,
        call=call,
        mean_k=key_means(call.k, grid),
        gamma=0.7,
        each_row=each_row,
        max_blocks=max_blocks,
    )
    for choice in (None, aware):
        expected = in_torch.plan_of_vertical_slash(verticals, slashes, choice, grid)
        plan = in_triton.plan_of_vertical_slash(verticals, slashes, choice, grid)
        assert torch.equal(plan.counts, expected.counts)
        assert torch.equal(plan.blocks(), expected.blocks())
        assert torch.equal(plan.computed_pairs(), expected.computed_pairs())


@pytest.mark.parametrize("reach", [False, True])
@pytest.mark.parametrize("queries, row_starts, softcap", [(200, None, None), (90, [0, 70], 4.0)])
def test_kernels_choose_the_lines_of_pytorch(
    reach: bool, queries: int, row_starts: list[int] | None, softcap: float | None
) -> None:
    call = make_call(200, queries=queries, row_starts=row_starts, heads=(4, 2), softcap=softcap, head_dim=24)
    grid = BlockGrid.of(call, 16)
    mean_k = key_means(call.k, grid)
    aware = []
    for gamma, tau, least, most in ((0.7, 0.0, 1, None), (0.9, 0.5, 2, 5)):
        rule = VerticalSlashParams(gamma, tau, least, most, reach)
        expected = in_torch.choose_vertical_slash(call, grid, mean_k, rule)
        chosen = in_triton.choose_vertical_slash(call, grid, mean_k, rule)
        for mine, theirs in zip(chosen, expected, strict=True):
            assert torch.equal(mine, theirs)
        aware.append(expected[2].float().mean())
    assert aware[0] < aware[1], "there are heads of both kinds"


def test_a_long_search_takes_many_programs_for_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(200, heads=(2, 1))
    grid = BlockGrid.of(call, 16)
    none = torch.zeros(1, 2, grid.num_key_blocks, dtype=torch.bool)
    aware = QueryAware(torch.ones(1, 2, dtype=torch.bool), call, key_means(call.k, grid), 0.8, False, None)
    expected = in_torch.plan_of_vertical_slash(none, none, aware, grid)
    monkeypatch.setattr(cut, "_LONG", 1)
    monkeypatch.setattr(cut, "_CHUNK", 256)
    plan = in_triton.plan_of_vertical_slash(none, none, aware, grid)
    assert 0 < plan.density().mean() < 1
    assert torch.equal(plan.blocks(), expected.blocks())
