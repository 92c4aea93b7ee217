"""Plans and their grid, compared with direct counting."""

import pytest
import torch
from builders.plans import random_blocks, random_pages
from calls import decode_call, make_call

from sparse_patch.plans import BlockGrid, BlockPlan, PagePlan, PairsInWaiting, SpanPlan, SparsePlan


@pytest.mark.parametrize("row_starts", [None, [0, 3, 50, 99]])
@pytest.mark.parametrize("queries", [100, 64, 37])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("columns", [None, 40])
def test_pairs_and_density_count_the_mask(
    row_starts: list[int] | None, queries: int, block_size: int, columns: int | None
) -> None:
    call = make_call(100, queries=queries, row_starts=row_starts)
    plan = random_blocks(call, block_size, 0.5 if columns is None else 0.2, columns=columns)
    mask = plan.mask()
    query = torch.arange(100 - queries, 100)[:, None]
    key = torch.arange(100)
    starts = torch.tensor(row_starts or [0])[:, None, None]
    causal = (key <= query) & (key >= starts)
    assert torch.equal(mask & causal[:, None], mask)
    assert torch.equal(plan.computed_pairs(), mask.sum((-1, -2)))
    expected = mask.sum((-1, -2)) / causal.sum((-1, -2))[:, None]
    torch.testing.assert_close(plan.density(), expected, atol=1e-6, rtol=0)


def test_lists_and_map_hold_the_same_blocks() -> None:
    call = make_call(200, queries=150, row_starts=[0, 40])
    grid = BlockGrid.of(call, 32)
    blocks = torch.rand(2, 4, grid.num_query_blocks, grid.num_key_blocks) < 0.5
    plan = BlockPlan.from_blocks(blocks, grid)
    assert torch.equal(plan.blocks(), blocks & grid.causal[:, None])
    assert torch.equal(plan.counts, (blocks & grid.causal[:, None]).sum(-1).int())
    assert plan.indices.dtype == plan.counts.dtype == torch.int32


def test_columns_are_read_before_the_query_block_and_outside_of_its_blocks() -> None:
    call = make_call(96, heads=(1, 1))
    grid = BlockGrid.of(call, 32)
    blocks = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    blocks[0, 0, 2, 0] = True
    plan = BlockPlan.from_blocks(blocks, grid, torch.tensor([[[70, 33, 5, -1, 40]]]))
    assert plan.columns is not None and plan.column_counts is not None
    assert plan.column_counts.tolist() == [[[0, 1, 2]]]
    assert plan.columns[0, 0, 1, :1].tolist() == [5] and plan.columns[0, 0, 2, :2].tolist() == [33, 40]


def test_the_grid_starts_at_each_rows_first_token() -> None:
    call = make_call(100, row_starts=[0, 37])
    grid = BlockGrid.of(call, 32)
    assert grid.key_blocks_per_row.tolist() == [4, 2]
    assert grid.tail.tolist() == [28, 1]
    assert grid.query_index[1, 0, 0] == 37
    assert grid.query_is_real.sum((-1, -2)).tolist() == [100, 63]


def test_a_chunk_lies_on_the_grid_of_the_whole_prompt() -> None:
    call = make_call(100, queries=30)
    grid = BlockGrid.of(call, 32)
    assert grid.query_block_ids.tolist() == [[2, 3]]
    assert [bound.tolist() for bound in grid.query_bounds] == [[[70, 96]], [[96, 100]]]
    assert not grid.aligned


@pytest.mark.parametrize("row_starts", [None, [0, 3, 50, 99, 100]])
@pytest.mark.parametrize("queries", [100, 37, 1])
@pytest.mark.parametrize("sink, window", [(0, 1), (4, 10), (60, 90), (200, 3), (5, None)])
def test_spans_by_their_definition(row_starts: list[int] | None, queries: int, sink: int, window: int | None) -> None:
    call = make_call(100, queries=queries, row_starts=row_starts)
    plan = SpanPlan.of(call, (sink, 2), (window, 7))
    mask = plan.mask()
    for row, start in enumerate(row_starts or [0]):
        for i in range(queries):
            at = 100 - queries + i - start
            for head, (first, last) in enumerate([(sink, window), (sink, window), (2, 7), (2, 7)]):
                near = 0 if last is None else max(at - last + 1, 0)
                read = {*range(min(first, at + 1)), *range(near, at + 1)} if at >= 0 else set()
                assert mask[row, head, i].nonzero().flatten().tolist() == sorted(start + key for key in read)
    assert torch.equal(plan.computed_pairs(), mask.sum((-1, -2)))
    assert torch.equal(counted(plan), mask.sum((0, 2, 3)))
    dense = SpanPlan.of(call, (0, 0), (None, None)).mask().sum((-1, -2))
    torch.testing.assert_close(plan.density(), mask.sum((-1, -2)) / dense.clamp(min=1))


def counted(plan: SparsePlan) -> torch.Tensor:
    pairs = plan.pairs_by_head
    return PairsInWaiting.total([pairs]) if isinstance(pairs, PairsInWaiting) else pairs


def test_pairs_of_many_plans_are_counted_together() -> None:
    """Of one kind, of several kinds, and of lists of several sizes."""
    plans: list[SparsePlan] = []
    for length, queries in ((100, 1), (70, 1), (103, 1), (90, 3)):
        call = decode_call(length, heads=(4, 2), queries=queries, row_starts=[0, 50])
        plans += [PagePlan.every(call), SpanPlan.of(call, (4, 2), (10, 7)), SpanPlan.of(call, (0, 3), (None, 60))]
        plans += [random_pages(call, lists, size, seed=length) for lists in (1, 2, 4) for size in (1, 16)]
    pairs = [plan.pairs_by_head for plan in plans]
    waiting = [each for each in pairs if isinstance(each, PairsInWaiting)]
    assert len(plans) - len(waiting) == 2, "spans of several queries, which take memory"
    expected = sum(each.plan.mask().sum((0, 2, 3)) for each in waiting)
    assert torch.equal(PairsInWaiting.total(waiting), expected)  # type: ignore[arg-type]


def test_a_plan_of_blocks_does_not_wait() -> None:
    """Its lists are large."""
    plan = random_blocks(make_call(100), 16, 0.5)
    assert torch.equal(counted(plan), plan.mask().sum((0, 2, 3)))
    assert not isinstance(plan.pairs_by_head, PairsInWaiting)
    with pytest.raises(NotImplementedError, match="BlockPlan cannot be stacked"):
        plan.stacked([plan])


def test_what_is_no_span_is_refused() -> None:
    call = make_call(20)
    for sinks, windows, message in (
        ((1,), (1,), "1 spans for 2 KV heads"),
        ((1, 2), (3,), "got 2 and 1"),
        ((1, -1), (3, 3), "a sink is 0 or more"),
        ((1, 1), (0, 3), "a window 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            SpanPlan.of(call, sinks, windows)
