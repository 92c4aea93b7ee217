"""`check_method`: every packaged method keeps its rules, and each planted fault is named."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from method_table import (
    DECODE_METHODS,
    PREFILL_METHODS,
    SMALL_MODEL,
    SPAN_METHODS,
    TOKEN_METHODS,
    MethodCase,
    in_folder,
    write_plans,
)

from sparse_patch.call import AttentionCall
from sparse_patch.methods import BudgetedMethod, Method, PrefillMethod, Selection
from sparse_patch.methods.base.budget import Count
from sparse_patch.methods.base.registry import registry
from sparse_patch.ops.selection.page_statistics import mean_scores, page_means
from sparse_patch.plans import BlockGrid, BlockPlan, Dense, PagePlan
from sparse_patch.testing import BrokenRule, check_method

ALL = [*PREFILL_METHODS, *TOKEN_METHODS, *DECODE_METHODS, *SPAN_METHODS]
SMALL_PREFILL = {"min_length": 0, "block_size": 16}
SMALL_DECODE = {"min_length": 0, "budget": 64}


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_every_packaged_method_keeps_the_rules(case: MethodCase, tmp_path: Path) -> None:
    write_plans(tmp_path, SMALL_MODEL)
    method = registry()[case.small["method"]]
    small, full = (in_folder(dict(settings), tmp_path) for settings in (case.small, case.full))
    held = check_method(method, small=_without_name(small), full=_without_name(full), shape=SMALL_MODEL)
    assert {rule.partition(":")[0] for rule in held if ":" in rule} == set(method.phases) and len(held) > 10


def _without_name(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "method"}


# --- a method that keeps the rules, and those that break one ---------------------------------------------------------


class Window(PrefillMethod):
    """The first block, the diagonal one and the one before it."""

    method: Literal["window"] = "window"
    every: bool = False

    def why_dense(self, call: AttentionCall) -> Dense | None:
        return Dense("every") if self.every else super().why_dense(call)

    def select(self, call: AttentionCall, grid: BlockGrid) -> Selection | BlockPlan:
        return Selection(self.blocks(call, grid))

    def blocks(self, call: AttentionCall, grid: BlockGrid) -> torch.Tensor:
        key_block = torch.arange(grid.num_key_blocks)
        distance = grid.query_block_ids[..., None] - key_block
        blocks = (key_block == 0) | (distance <= 1)
        return blocks[:, None].expand(-1, call.q.shape[1], -1, -1)


class LacksTheDiagonal(Window):
    method: Literal["lacks_the_diagonal"] = "lacks_the_diagonal"  # type: ignore[assignment]

    def blocks(self, call: AttentionCall, grid: BlockGrid) -> torch.Tensor:
        key_block = torch.arange(grid.num_key_blocks)
        return super().blocks(call, grid) & (key_block != grid.query_block_ids[..., None])[:, None]


class CountsFromTheBatch(Window):
    """Blocks of the batch's own positions: a padded row is cut elsewhere."""

    method: Literal["counts_from_the_batch"] = "counts_from_the_batch"  # type: ignore[assignment]

    def blocks(self, call: AttentionCall, grid: BlockGrid) -> torch.Tensor:
        even = ((call.kv_length - grid.q_start) // 16 + torch.arange(grid.num_key_blocks)) % 2 == 0
        return super().blocks(call, grid) | (even & (call.k[:, :, :16].sum((1, 2, 3)) > 0)[:, None])[:, None, None]


class WaitsForTheGpu(Window):
    method: Literal["waits_for_the_gpu"] = "waits_for_the_gpu"  # type: ignore[assignment]

    def blocks(self, call: AttentionCall, grid: BlockGrid) -> torch.Tensor:
        assert call.k.abs().max().item() > 0
        return super().blocks(call, grid)


class LeavesShortRowsSparse(Window):
    """Makes the plan itself and forgets the short rows."""

    method: Literal["leaves_short_rows_sparse"] = "leaves_short_rows_sparse"  # type: ignore[assignment]

    def select(self, call: AttentionCall, grid: BlockGrid) -> Selection | BlockPlan:
        return BlockPlan.from_blocks(self.blocks(call, grid), grid)


class MixesHeads(Window):
    method: Literal["mixes_heads"] = "mixes_heads"  # type: ignore[assignment]

    def blocks(self, call: AttentionCall, grid: BlockGrid) -> torch.Tensor:
        blocks = super().blocks(call, grid).clone()
        blocks[:, 0] |= grid.query_block_ids[:, :, None] - torch.arange(grid.num_key_blocks) <= 4
        return blocks


class WritesToItsInputs(Window):
    method: Literal["writes_to_its_inputs"] = "writes_to_its_inputs"  # type: ignore[assignment]

    def blocks(self, call: AttentionCall, grid: BlockGrid) -> torch.Tensor:
        call.k.mul_(1.0001)
        return super().blocks(call, grid)


class Means(BudgetedMethod):
    """Pages by their mean logit."""

    keeps_state: ClassVar[bool] = True
    method: Literal["means"] = "means"

    @property
    def fewest(self) -> int:
        return 8

    def pages(self, tokens: Count) -> Count:
        return -(-tokens // 8)

    def statistics(self, call: AttentionCall) -> Any:
        return page_means(call, 8)

    def choose(self, call: AttentionCall, statistics: Any) -> PagePlan:
        lengths = call.lengths()
        scores = mean_scores(call.q[:, :, -1], statistics, lengths, 8)
        return PagePlan.of(call, *self.highest(call, scores, lengths, 8), 8)


class KeepsStateInSecret(Means):
    keeps_state: ClassVar[bool] = False
    method: Literal["keeps_state_in_secret"] = "keeps_state_in_secret"  # type: ignore[assignment]


class TakesTheBufferForTheCache(Means):
    method: Literal["takes_the_buffer"] = "takes_the_buffer"  # type: ignore[assignment]

    def choose(self, call: AttentionCall, statistics: Any) -> PagePlan:
        lengths = call.kv_length - call.row_starts()
        last = ((lengths - 1) // 8).int()[:, None, None].expand(-1, call.q.shape[1], 1).contiguous()
        return PagePlan.of(call, last, torch.ones_like(last[..., 0]), 8)


class LooksAtTheLengthItself(Means):
    """Half of the budget for long texts."""

    method: Literal["looks_at_the_length"] = "looks_at_the_length"  # type: ignore[assignment]

    def choose(self, call: AttentionCall, statistics: Any) -> PagePlan:
        plan = super().choose(call, statistics)
        assert plan.counts is not None
        is_long = call.known_end is not None and call.known_end > 320
        return replace(plan, counts=plan.counts // 2) if is_long else plan


class SharesAListAmongForwards(Means):
    """What the first layer of a forward chose, kept on the class."""

    lists: ClassVar[dict[int, Any]] = {}
    method: Literal["shares_a_list"] = "shares_a_list"  # type: ignore[assignment]

    def choose(self, call: AttentionCall, statistics: Any) -> PagePlan:
        if call.layer == 0:
            self.lists[0] = super().choose(call, statistics)
        kept = self.lists[0]
        return PagePlan.of(call, kept.pages, kept.counts.clamp(max=call.kv_length // 8), 8)


def test_a_method_of_ones_own_keeps_the_rules() -> None:
    check_method(Window, small=SMALL_PREFILL, full={"every": True})
    check_method(Means, small=SMALL_DECODE, full={"min_length": 0, "budget": 1000})
    assert {"window", "means"} <= registry().keys(), "it is registered from then on"


FAULTS: list[tuple[type[Method], str]] = [
    (LacksTheDiagonal, "every query reads its own key"),
    (CountsFromTheBatch, "a padded row selects what it selects without the batch"),
    (WaitsForTheGpu, "planning reads no value of a tensor on the host"),
    (LeavesShortRowsSparse, "a short row in a batch is dense"),
    (MixesHeads, "the heads of a KV head choose by themselves"),
    (WritesToItsInputs, "planning leaves queries, keys and values as they are"),
    (KeepsStateInSecret, "a method that keeps tensors beside the cache says so"),
    (TakesTheBufferForTheCache, "a static cache is read as a growing one"),
    (LooksAtTheLengthItself, "a step is planned by the length that the host knows in `why_dense` only"),
    (SharesAListAmongForwards, "two forwards in turn read what each reads by itself"),
]


@pytest.mark.parametrize("method, rule", FAULTS, ids=[method.__name__ for method, _ in FAULTS])
def test_a_planted_fault_is_named(method: type[Method], rule: str) -> None:
    of_prefill = issubclass(method, Window)
    small, full = (SMALL_PREFILL, {"every": True}) if of_prefill else (SMALL_DECODE, {"min_length": 0, "budget": 1000})
    with pytest.raises(BrokenRule) as broken:
        check_method(method, small=small, full=full)
    assert broken.value.rule.startswith(rule), str(broken.value)
    assert "; but " in str(broken.value) and "Usual cause: " in str(broken.value) and "\n" not in str(broken.value)


def test_settings_that_are_not_small_or_not_full_are_named() -> None:
    for small, full, rule in (
        ({}, {"every": True}, "the small settings are sparse"),
        (SMALL_PREFILL, SMALL_PREFILL, "the full settings read every key"),
        ({"bock_size": 16}, {}, "settings are plain values that a YAML file can hold"),
    ):
        with pytest.raises(BrokenRule, match=f"^{rule}"):
            check_method(Window, small=small, full=full)


def test_a_field_without_a_default_is_named() -> None:
    class Demanding(Window):
        method: Literal["demanding"] = "demanding"  # type: ignore[assignment]
        must: int

    small = {**SMALL_PREFILL, "must": 1}
    with pytest.raises(BrokenRule, match=r"^every field has a default; but must has none"):
        check_method(Demanding, small=small, full={"must": 1, "every": True})


def test_what_is_no_method_is_named() -> None:
    class Nameless(PrefillMethod):
        def select(self, call: AttentionCall, grid: BlockGrid) -> Selection:
            raise NotImplementedError

    class Unfinished(PrefillMethod):
        method: Literal["unfinished"] = "unfinished"

    for method, message in ((Nameless, "has no name; add method"), (Unfinished, "has no select; write it")):
        with pytest.raises(BrokenRule, match=message):
            check_method(method, small={}, full={})
