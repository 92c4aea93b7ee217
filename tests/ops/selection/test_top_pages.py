"""Lists of the highest pages, in Triton and in PyTorch, against Python's sort."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_patch.ops.selection.top_pages as ops
from sparse_patch.ops.selection.top_pages import top_pages
from sparse_patch.ops.selection.top_pages import top_pages as op
from sparse_patch.ops.selection.top_pages import triton as kernels
from sparse_patch.ops.selection.top_pages.torch import top_pages as in_torch
from sparse_patch.ops.selection.top_pages.triton import filter as filtering
from sparse_patch.ops.selection.top_pages.triton import lists as choosing
from sparse_patch.plans import leading

INF, NAN = math.inf, math.nan


def in_triton(scores: torch.Tensor, limits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return kernels.top_pages(scores, limits, k)


BACKENDS = pytest.mark.parametrize("backend", [in_torch, in_triton], ids=["torch", "triton"])


def by_sorting(scores: torch.Tensor, limits: torch.Tensor, k: int) -> list[list[list[int]]]:
    """The pages of each list of each row: sorted best first (ties: lower first), cut to k, then in ascending order."""
    return [
        [
            sorted(sorted(range(limit), key=lambda i: (-(-INF if math.isnan(s[i]) else s[i]), i))[:k])
            for s, limit in zip(row, row_limits, strict=True)
        ]
        for row, row_limits in zip(scores.tolist(), limits.clamp(0, scores.shape[-1]).tolist(), strict=True)
    ]


def assert_exact(backend: object, scores: torch.Tensor, limits: torch.Tensor, k: int) -> None:
    k = min(k, scores.shape[-1])
    pages, counts = backend(scores, limits, k)  # type: ignore[operator]
    assert pages.dtype == counts.dtype == torch.int32
    assert pages.shape == (*scores.shape[:2], k) and counts.shape == scores.shape[:2]
    assert ((pages >= 0) & (pages < scores.shape[-1])).all()
    for row, lists in enumerate(by_sorting(scores, limits, k)):
        for i, expected in enumerate(lists):
            assert pages[row, i, : counts[row, i]].tolist() == expected


def structured(kind: str, *shape: int) -> torch.Tensor:
    scores = torch.randn(shape)
    if kind == "ties":
        scores = (scores * 2).round() / 2  # has 0.0 and -0.0
    elif kind == "equal":
        scores.zero_()
    elif kind == "holes":
        scores[torch.rand(shape) < 0.7] = -INF
        scores[torch.rand(shape) < 0.1] = NAN
    elif kind == "forced":
        scores = scores.exp()
        scores[..., -9:-1] = INF
    elif kind == "close":
        scores = 1 + scores * 1e-6
    elif kind == "wide":
        scores = scores * 10.0 ** torch.randint(-45, 38, shape)
    return scores


@BACKENDS
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "holes", "forced", "close", "wide"])
@pytest.mark.parametrize("size", [1, 2, 32, 33, 150])
def test_exact(backend: object, kind: str, size: int) -> None:
    scores = structured(kind, 3, 2, size)
    limits = torch.tensor([[size, 0], [size // 2, 1], [max(size - 1, 0), size + 7]])
    scores[0, 1] = scores[2, 0, -1] = NAN  # beyond the limit
    for k in sorted({1, size // 3, size + 5} - {0}):
        assert_exact(backend, scores, limits, k)


@BACKENDS
def test_a_long_list_of_random_scores(backend: object) -> None:
    scores = torch.randn(1, 2, 3000)
    assert_exact(backend, scores, torch.tensor([[3000, 2345]]), 777)


@pytest.fixture
def short_lists_are_filtered(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"_SHORT": 32, "_WIDEST": 64}.items():
        monkeypatch.setattr(choosing, name, value)
    for name, value in {"_SAMPLE": (16, 16), "_PART": (32, 32)}.items():
        monkeypatch.setattr(filtering, name, value)
    return monkeypatch


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "holes", "forced", "close", "wide"])
@pytest.mark.parametrize(
    "programs, margin", [(4, 0.0), (64, 0.0), (64, 4.5), (64, 100.0)], ids=["one part", "too few", "enough", "too many"]
)
def test_lists_that_are_filtered_first(
    kind: str, programs: int, margin: float, short_lists_are_filtered: pytest.MonkeyPatch
) -> None:
    """What is chosen does not depend on how many pages reach the sample's score."""
    short_lists_are_filtered.setattr(filtering, "_MARGIN", margin)
    short_lists_are_filtered.setattr(filtering, "_PROGRAMS", programs)
    for size, k in ((65, 3), (200, 32)):
        scores = structured(kind, 2, 2, size)
        limits = torch.tensor([[size, 60], [size - 20, 70]])
        assert_exact(in_triton, scores, limits, k)


def test_many_pages_with_the_smallest_chosen_score(short_lists_are_filtered: pytest.MonkeyPatch) -> None:
    scores = torch.zeros(1, 2, 400)
    scores[0, 1, 50::40] = 1.0
    for k in (8, 10):
        assert_exact(in_triton, scores, torch.tensor([[400, 390]]), k)


@pytest.mark.parametrize("path", ["torch", "one program", "filtered"])
@pytest.mark.parametrize("page_size, spared, first, last", [(1, 0, 0, 1), (1, 3, 2, 2), (16, 0, 0, 1), (4, 7, 1, 3)])
def test_first_and_last_pages_come_first(
    path: str, page_size: int, spared: int, first: int, last: int, request: pytest.FixtureRequest
) -> None:
    """They are counted from what is left of the limit; pages after it do not matter, whatever their scores."""
    size, k = 200, 9
    tokens = torch.tensor([0, 1, 4, 50, 150 * page_size, 200 * page_size + spared, 220 * page_size])
    real = (-(-(tokens - spared) // page_size)).clamp(0, size)
    page, scores = torch.arange(size), torch.randn(len(tokens), 2, size)
    scores[..., 17] = INF
    forced = scores.masked_fill(((page < first) | (page >= real[:, None] - last))[:, None], INF)
    monkeypatch = request.getfixturevalue("short_lists_are_filtered" if path == "filtered" else "monkeypatch")
    monkeypatch.setattr(ops, "prefers_triton", lambda _: path != "torch")
    assert_exact(
        lambda s, _, k: top_pages(scores, tokens, k, page_size, spared=spared, first=first, last=last),
        forced,
        real[:, None].expand(-1, 2),
        k,
    )


@pytest.mark.parametrize("size, k", [(5000, 64), (32768, 2048), (32768, 4096), (131072, 2048), (131072, 4096)])
def test_the_sample_of_random_scores_leaves_the_right_number_of_candidates(size: int, k: int) -> None:
    sample, capacity, scores = filtering.sample_of(size), filtering.capacity_of(size, k), torch.randn(200, size)
    place = (torch.arange(sample) * 65536 + (torch.arange(sample) * 40503 & 0xFFFF)) * size // (sample * 65536)
    of_sample = k * sample / size
    wanted = int(of_sample + filtering._MARGIN * of_sample**0.5 + 2)
    for reach in (wanted, wanted + wanted // 16):
        floor = scores[:, place].sort(descending=True).values[:, reach - 1 : reach]
        candidates = (scores >= floor).sum(-1)
        assert k <= candidates.min() and candidates.max() <= capacity < size // 2


def test_a_choice_too_wide_for_a_program_is_left_to_pytorch() -> None:
    assert kernels.why_unsupported(torch.empty(1, 1, 1 << 17), 1 << 15) is not None
    assert kernels.why_unsupported(torch.empty(1, 1, 1 << 17), 1 << 14) is None
    assert kernels.why_unsupported(torch.empty(1, 1, 1 << 15), 1 << 15) is None
    assert kernels.why_unsupported(torch.empty(1, 1, 5), 0) is not None


@BACKENDS
def test_any_strides(backend: object) -> None:
    scores = torch.randn(40, 3, 2).permute(2, 1, 0)
    limits = torch.tensor([30, 40])[:, None].expand(2, 3)
    assert_exact(backend, scores, limits, 7)


def test_limits_of_rows() -> None:
    scores = torch.randn(2, 3, 20)
    assert_exact(lambda s, _, k: op(s, torch.tensor([5, 20]), k), scores, torch.tensor([[5] * 3, [20] * 3]), 9)


def test_no_pages_at_all() -> None:
    for size, k in ((0, 4), (4, 0)):
        pages, counts = op(torch.randn(2, 3, size), torch.tensor([4, 4]), k)
        assert pages.shape == (2, 3, 0) and counts.tolist() == [[0] * 3] * 2


def test_no_host_sync() -> None:
    with FakeTensorMode():
        pages, counts = op(torch.empty(2, 3, 100), torch.empty(2, dtype=torch.int64), 7)
        assert pages.shape == (2, 3, 7) and counts.shape == (2, 3)


def test_the_kernel_declares_what_it_does() -> None:
    arguments = torch.randn(2, 3, 40), torch.full((2, 3), 40), 7, 1, 0, 0, 1
    torch.library.opcheck(kernels.select_pages.op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_limits_may_be_given_in_tokens(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(5, 2, 9, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([0, 1, page_size, 3 * page_size + 1, 9 * page_size])
    expected, expected_counts = top_pages(scores, -(-tokens // page_size), 4)
    for takes in (False, True):
        monkeypatch.setattr(ops, "prefers_triton", lambda _, takes=takes: takes)
        found, counts = top_pages(scores, tokens, 4, page_size)
        listed = leading(found, counts)
        assert torch.equal(counts, expected_counts) and torch.equal(found[listed], expected[listed])
