"""The kernel that counts the pairs of a plan of pages, against the plan's own numbers."""

from dataclasses import replace

import pytest
import torch

from sparse_patch.kernels.page_pairs.triton import add_page_pairs
from sparse_patch.plans import PagePlan, pages


def plan_of(page_size: int, lists: int, heads: int, q_length: int = 1, size: int = 90) -> PagePlan:
    """Random lists in random order; a row of every length, one of them shorter than its queries."""
    lengths = torch.tensor([size, size // 2, q_length, max(q_length - 2, 1)])
    in_all = -(-size // page_size)
    order = torch.rand(len(lengths), lists, in_all).argsort(-1)
    real = order * page_size < lengths[:, None, None]
    listed = order.gather(-1, (~real).int().argsort(dim=-1, stable=True)).int()  # real pages first
    counts = (torch.rand(len(lengths), lists) * (real.sum(-1) + 1)).int()
    listed.masked_fill_(torch.arange(in_all) >= counts[..., None], 1 << 30)  # no meaning
    starts = size - lengths
    return PagePlan(page_size, heads, q_length, size, lengths, starts, listed, counts)


def check(plan: PagePlan) -> None:
    total = torch.arange(plan.heads) * (1 << 33)
    expected = total + plan.computed_pairs().sum(0)
    add_page_pairs(total, plan.lengths, plan.pages, plan.counts, plan.page_size, plan.q_length)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("lists, heads", [(1, 1), (1, 6), (2, 6), (6, 6)])
@pytest.mark.parametrize("q_length", [1, 2, 7])
def test_pairs_of_lists(page_size: int, lists: int, heads: int, q_length: int) -> None:
    check(plan_of(page_size, lists, heads, q_length))


@pytest.mark.parametrize("q_length", [1, 7])
def test_pairs_of_every_page(q_length: int) -> None:
    check(replace(plan_of(16, 1, 6, q_length), pages=None, counts=None))


def test_numbers_beyond_32_bits() -> None:
    lengths = torch.tensor(1 << 20).expand(3)
    check(PagePlan(1, 2, 1 << 20, 1 << 20, lengths))


def test_strides_and_long_lists() -> None:
    plan = plan_of(2, 2, 4, size=10_000)
    assert plan.pages is not None and plan.counts is not None
    strided = plan.pages.transpose(1, 2).contiguous().transpose(1, 2)
    check(replace(plan, pages=strided, counts=plan.counts.t().contiguous().t()))


@pytest.mark.parametrize("takes", [False, True], ids=["torch", "triton"])
def test_a_plan_adds_its_pairs(takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "prefers_triton", lambda _: takes)
    plan, total = plan_of(16, 2, 4), torch.tensor([1, 2, 3, 4])
    plan.add_pairs(total)
    assert torch.equal(total, torch.tensor([1, 2, 3, 4]) + plan.computed_pairs().sum(0))


def test_the_kernel_declares_what_it_does() -> None:
    plan = plan_of(16, 2, 4)
    arguments = torch.zeros(4, dtype=torch.int64), plan.lengths, plan.pages, plan.counts, 16, 1
    torch.library.opcheck(add_page_pairs.op, arguments, test_utils=("test_schema", "test_faketensor"))
