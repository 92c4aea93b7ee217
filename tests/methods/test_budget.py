"""What holds for every decode method with a budget, whatever the method selects."""

import math
from typing import Any

import pytest
import torch
from calls import in_buffer
from decode_steps import Step, decode_call, forward, forward_of_row
from method_table import DECODE_METHODS, SMALL_MODEL, MethodCase

from sparse_patch import ConfigError, load_config
from sparse_patch.artefacts.layer_roles import Roles
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.methods.base.registry import registry
from sparse_patch.methods.delta import Delta
from sparse_patch.methods.lessismore import LessIsMore
from sparse_patch.plans import Dense, PagePlan

CASES = pytest.mark.parametrize("case", DECODE_METHODS, ids=lambda case: case.name)


def build(settings: dict[str, Any], **changes: Any) -> BoundMethod:
    settings = {**settings, **changes}
    return registry()[settings["method"]].model_validate(settings).bind(SMALL_MODEL)


def with_ratio(case: MethodCase, ratio: float) -> dict[str, Any]:
    return {key: value for key, value in case.small.items() if key != "budget"} | {"budget_ratio": ratio}


def calls(length: int, layers: tuple[int, ...] = (1, 2), **settings: Any) -> list[Any]:
    return [decode_call(length, layer=layer, **settings) for layer in layers]


def sparse_step(method: BoundMethod, length: int, **settings: Any) -> Step:
    """A layer that reads a list: layer 2. If layers have roles, layer 1 selects before it."""
    step = forward(method, calls(length, **settings))[1]
    assert isinstance(step.plan, PagePlan) and step.plan.pages is not None
    return step


def test_every_budgeted_method_is_in_the_table() -> None:
    sparse = {name for name, method in registry().items() if method.phases == ("decode",)}
    assert {case.small["method"] for case in DECODE_METHODS} == sparse


@CASES
def test_lists_are_within_the_budget_and_counted_right(case: MethodCase) -> None:
    step = sparse_step(build(case.small), 400, heads=(4, 2))
    plan = step.plan
    assert isinstance(plan, PagePlan)
    attended = step.mask.sum((-1, -2))
    assert torch.equal(plan.computed_pairs(), attended)
    torch.testing.assert_close(plan.density(), attended / 400.0)
    slack = 16 if case.small["method"] in ("quest", "kinetics") else 0  # a window that grows, a page that is added
    budget = case.small["budget"]
    assert budget - 8 <= attended.min() and attended.max() <= budget + slack


@CASES
def test_full_budgets_are_dense_in_every_layer(case: MethodCase) -> None:
    for step in forward(build(case.full), calls(400, layers=tuple(range(5)))):
        assert isinstance(step.plan, Dense)
    for settings in (case.full, with_ratio(case, 1.0)):
        step = forward(build(settings), [in_buffer(call, 60) for call in calls(340)])[1]
        causal = PagePlan.every(step.call).mask()
        assert torch.equal(step.mask, causal)


@CASES
@pytest.mark.parametrize("length", [1, 7, 8, 9, 48])
def test_rows_with_no_more_keys_than_the_budget_read_everything(case: MethodCase, length: int) -> None:
    """Only the device knows the length, because the buffer is larger than the budget."""
    step = forward(build(case.small), [in_buffer(call, 400) for call in calls(length)])[1]
    assert isinstance(step.plan, PagePlan) and step.plan.pages is not None
    assert torch.equal(step.mask, PagePlan.every(step.call).mask())
    assert not step.output.isnan().any()


@CASES
@pytest.mark.parametrize("ratio", [None, 0.3], ids=["tokens", "ratio"])
def test_a_padded_row_reads_what_it_reads_alone(case: MethodCase, ratio: float | None) -> None:
    method = build(case.small if ratio is None else with_ratio(case, ratio))
    batch = calls(400, row_starts=[0, 7, 64, 130, 390], value_dim=24)
    steps = forward(method, batch)
    for row, start in enumerate([0, 7, 64, 130, 390]):
        for step, alone in zip(steps, forward_of_row(method, batch, row), strict=True):
            assert torch.equal(step.mask[row, :, :, start:], alone.mask[0]), f"row {row}, layer {step.call.layer}"
            assert not step.mask[row, :, :, :start].any()
            torch.testing.assert_close(step.output[row], alone.output[0], atol=1e-6, rtol=1e-5)


@CASES
@pytest.mark.parametrize("row_starts", [None, [0, 37]], ids=["plain", "padded"])
def test_a_static_buffer_with_a_poisoned_tail_changes_nothing(case: MethodCase, row_starts: list[int] | None) -> None:
    method = build(case.small)
    growing = calls(300, row_starts=row_starts)
    for step, static in zip(
        forward(method, growing), forward(method, [in_buffer(call, 77) for call in growing]), strict=True
    ):
        assert torch.equal(step.mask, static.mask[..., :300]) and not static.mask[..., 300:].any()
        assert torch.equal(step.output, static.output)


@CASES
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
def test_a_ratio_is_the_budget_of_a_row_alone(case: MethodCase, ratio: float) -> None:
    by_ratio, length = build(with_ratio(case, ratio)), 400
    tokens = max(math.ceil(ratio * length), by_ratio.settings.fewest)  # type: ignore[attr-defined]
    by_tokens = build(case.small, budget=tokens)
    assert torch.equal(sparse_step(by_ratio, length).mask, sparse_step(by_tokens, length).mask)


@CASES
def test_recall_grows_with_the_budget(case: MethodCase) -> None:
    """The recall is that of the layer whose attention decides: layer 1, or else the sparse layer itself."""
    length, before = 600, torch.zeros(1, 4)
    for budget in (96, 144, 224, 400, 560):
        selecting, sparse = calls(length)
        method = build(case.small, budget=budget)
        steps = forward(method, [selecting, sparse])
        source = steps[0].call if case.small.get("layers") == {"full": [0], "select": [1, 3]} else steps[1].call
        attention = (source.q @ source.k.repeat_interleave(2, 1).transpose(-1, -2) * source.scale).softmax(-1)
        recall = (attention * steps[1].mask).sum((-1, -2))
        slack = 0.02 if case.small["method"] in ("quest", "kinetics", "lessismore") else 1e-6  # scores are not the mass
        per_head = recall if case.small["method"] != "delta" else recall.mean(1, keepdim=True)
        assert (per_head >= before - slack).all(), f"budget {budget}"
        before = per_head
    assert before.min() > 0.9


@CASES
def test_dense_answers(case: MethodCase) -> None:
    method = build(case.small, min_length=500)
    for layer in (1, 2):
        short = forward(method, [decode_call(499, layer=layer)])[0].plan
        assert short == Dense("shorter than min_length 500")
    assert all(isinstance(step.plan, PagePlan) for step in forward(method, calls(500)))
    several = forward(build(case.small), calls(400, queries=2))
    assert [step.plan for step in several] == [Dense("more than one query")] * 2


@CASES
def test_a_planted_needle_is_read_whatever_the_weights(case: MethodCase) -> None:
    """In the selecting layer, one key is exactly what the query asks for."""
    method = build(case.small)
    for needle in (5, 100, 201, 322, 399):
        selecting, sparse = calls(400, seed=needle)
        for call in (selecting, sparse):
            call.k[:, :, needle] = 40 * call.q[:, ::2, -1] / call.q[:, ::2, -1].norm(dim=-1, keepdim=True)
            call.q[:, 1::2] = call.q[:, ::2]  # the heads of a group ask for the same
        assert forward(method, [selecting, sparse])[1].mask[..., needle].all(), f"needle at {needle}"


@CASES
@pytest.mark.parametrize("heads, softcap", [((3, 3), None), ((8, 2), 5.0), ((7, 1), None)])
def test_any_heads_and_softcap(case: MethodCase, heads: tuple[int, int], softcap: float | None) -> None:
    step = sparse_step(build(case.small), 300, heads=heads, softcap=softcap)
    lists = step.plan.pages.shape[1]  # type: ignore[union-attr]
    expected = {"all": 1, "kv_group": heads[1], "q_head": heads[0]}
    single = {"delta": 1, "lessismore": 1, "kinetics": heads[1]}
    assert lists == single.get(case.small["method"], expected.get(case.small.get("index_sharing", "")))


BAD = [
    ({"method": "delta", "budget": 0}, "budget: expected greater than 0, got int 0"),
    ({"method": "delta", "budget": 1.5}, "budget: expected a valid integer, got float 1.5"),
    ({"method": "delta", "budget_ratio": 1.5}, "budget_ratio: expected less than or equal to 1 or null"),
    ({"method": "delta", "budget_ratio": 0.0}, "budget_ratio: expected greater than 0 or null"),
    ({"method": "delta", "budget": None}, "budget: missing; give budget in tokens or budget_ratio"),
    ({"method": "delta", "budget": 64, "budget_ratio": 0.1}, "budget_ratio: budget is 64 already; set budget: null"),
    ({"method": "delta", "budget": 100}, "budget: 100 is below 128, the tokens that a list needs at least"),
    ({"method": "lessismore", "budget": 6}, "budget: 6 is below 7, the tokens that a list needs at least"),
    ({"method": "lessismore", "recency": 1.0}, "recency: expected less than 1"),
    ({"method": "quest", "budget": 31}, "budget: 31 is below 32"),
    ({"method": "quest", "budget": 47, "current_page": "scored"}, "budget: 47 is below 48"),
    ({"method": "quest", "page_size": 64}, "page_size: expected 4, 8, 16 or 32, got int 64"),
    ({"method": "kinetics", "budget": 83}, "budget: 83 is below 84"),
    ({"method": "kinetics", "window": 0}, "window: expected greater than or equal to 1"),
    ({"method": "tidaldecode", "index_sharing": "head"}, "index_sharing: expected 'q_head', 'kv_group' or 'all'"),
    ({"method": "delta", "recency_pages": 0}, "recency_pages: expected greater than or equal to 1"),
]


@pytest.mark.parametrize("settings, message", BAD, ids=[f"{row[0]['method']}: {row[1][:30]}" for row in BAD])
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config({"decode": settings})
    assert str(error.value).startswith(f"dict: decode.{message}") and "\n" not in str(error.value)


def test_a_ratio_takes_the_place_of_the_default_budget() -> None:
    method = Delta(budget_ratio=0.2)
    assert method.budget is None
    config = load_config("delta.yaml", decode={"budget": None, "budget_ratio": 0.2})
    assert load_config(config.settings()).settings() == config.settings()
    with pytest.raises(ConfigError, match=r"delta.yaml: decode.budget_ratio: budget is 1024 already"):
        load_config("delta.yaml", decode={"budget_ratio": 0.2})


def test_the_smallest_budget_of_lessismore_holds_sinks_and_the_current_token() -> None:
    for sinks in (0, 4, 9):
        for recency in (0.01, 0.25, 0.9):
            method = LessIsMore(sink=sinks, recency=recency, roles=Roles(full=[0], select=[1]), min_length=0)
            method = method.model_copy(update={"budget": method.fewest})
            step = sparse_step(method.bind(SMALL_MODEL), 400)
            assert step.mask[..., -1].all() and step.mask[..., :sinks].all()
            assert step.mask.sum(-1).max() == method.fewest
