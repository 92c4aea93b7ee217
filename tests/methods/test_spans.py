"""What methods with spans decide: every method of the table, on calls."""

from pathlib import Path
from typing import Any

import pytest
import torch
from calls import make_call, row_alone
from method_table import SMALL_MODEL, SPAN_METHODS, MethodCase, write_plans

from sparse_patch.methods.base.registry import registry
from sparse_patch.methods.base.spans import BoundSpans, SpanMethod
from sparse_patch.ops.attention.span import attend
from sparse_patch.plans import Dense, GrowingWindow, SpanPlan, Window


def build(settings: dict[str, Any], folder: Path) -> BoundSpans:
    write_plans(folder, SMALL_MODEL)
    files = {"calibration": str(folder / settings["calibration"])} if "calibration" in settings else {}
    method = registry()[settings["method"]].model_validate({**settings, **files})
    resolved = method.bind(SMALL_MODEL)
    assert isinstance(resolved, BoundSpans)
    return resolved


CASES = pytest.mark.parametrize("case", SPAN_METHODS, ids=lambda case: case.name)


def test_every_method_of_spans_is_in_the_table() -> None:
    assert {case.small["method"] for case in SPAN_METHODS} == {
        name for name, method in registry().items() if issubclass(method, SpanMethod)
    }


@CASES
@pytest.mark.parametrize("queries", [400, 150, 1])
def test_a_padded_row_and_grouped_heads(case: MethodCase, queries: int, tmp_path: Path) -> None:
    method = build(case.small, tmp_path)
    batch = make_call(400, queries=queries, row_starts=[0, 7, 130], value_dim=24)
    plan = method.plan(batch)
    assert isinstance(plan, SpanPlan) and plan.density().mean() < 0.9
    output, _, _ = attend(batch, plan)
    for row in range(3):
        alone, real = row_alone(batch, row)
        of_row = SpanPlan.of(alone, plan.sinks, plan.windows)
        start = int(batch.kv_start[row])  # type: ignore[index]
        assert torch.equal(plan.mask()[row, :, real, start:], of_row.mask()[0])
        torch.testing.assert_close(output[row : row + 1, :, real], attend(alone, of_row)[0], atol=2e-6, rtol=1e-5)


@CASES
def test_the_whole_prompt_and_its_last_chunk_agree(case: MethodCase, tmp_path: Path) -> None:
    method = build(case.small, tmp_path)
    whole, chunk = (method.plan(make_call(400, queries=queries)) for queries in (400, 77))
    assert isinstance(whole, SpanPlan) and isinstance(chunk, SpanPlan)
    assert torch.equal(whole.mask()[:, :, -77:], chunk.mask())


@CASES
def test_full_settings_and_short_calls_are_dense(case: MethodCase, tmp_path: Path) -> None:
    assert isinstance(build(case.full, tmp_path).plan(make_call(400)), Dense)
    for length in (1, 7):
        assert isinstance(build(case.small, tmp_path).plan(make_call(length)), Dense)


@pytest.mark.parametrize(
    "windows", [(7, None), (GrowingWindow(-3 << 16, 1 << 15, 2, 40), GrowingWindow(0, 9999, 1, 9))]
)
def test_computed_pairs_are_those_of_the_mask(windows: tuple[Window, ...]) -> None:
    call = make_call(60, queries=20, row_starts=[0, 45, 3])
    plan = SpanPlan.of(call, (2, 0), windows)
    assert torch.equal(plan.computed_pairs(), plan.mask().sum((-1, -2)))
