"""The merged list of all heads, in Triton and in PyTorch, against the merge written out."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_patch.ops.selection import rank_merge as ops
from sparse_patch.ops.selection.rank_merge import merged_scores
from sparse_patch.ops.selection.rank_merge import torch as in_torch
from sparse_patch.ops.selection.rank_merge import triton as kernels
from sparse_patch.ops.selection.top_pages import top_pages
from sparse_patch.ops.selection.top_pages.triton import filter as filtering
from sparse_patch.plans import leading


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that the op uses in this test."""
    name: str = request.param
    monkeypatch.setattr(ops, "prefers_triton", lambda _: name == "triton")
    return name


def merge(scores: list[list[float]], limit: int, k: int) -> list[int]:
    """Merge the heads' top k rank by rank; list each token once and keep the first k."""
    order = [sorted(range(limit), key=lambda i: (-head[i], i))[:k] for head in scores]
    merged = [head[rank] for rank in range(min(k, limit)) for head in order]
    return list(dict.fromkeys(merged))[:k]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size, limits, k", [(1, [1], 1), (50, [50, 33], 10), (50, [49, 3], 20), (9, [9, 0], 12)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_highest_scores_are_the_merged_list(size: int, limits: list[int], k: int, ties: bool) -> None:
    scores = torch.randn(len(limits), 4, size)
    if ties:
        scores = scores.round()
    for row, limit in enumerate(limits):
        scores[row, :, limit:] = torch.nan
    merged = merged_scores(scores, torch.tensor(limits), k)
    assert merged.dtype == torch.float32 and merged.shape == (len(limits), size)
    pages, counts = top_pages(merged[:, None], torch.tensor(limits), k)
    for row, limit in enumerate(limits):
        expected = merge(scores[row].tolist(), limit, k)
        assert merged[row].argsort(stable=True, descending=True)[: len(expected)].tolist() == expected
        assert pages[row, 0, : counts[row, 0]].tolist() == sorted(expected)
        listed = merged[row][merged[row] > 0]
        assert len(listed.unique()) == len(listed) >= len(expected)


@pytest.mark.usefixtures("backend")
def test_the_favourite_of_a_head_is_in() -> None:
    scores = torch.zeros(1, 8, 100)
    for head in range(8):
        scores[0, head, 99 - head] = 1e-3
    merged = merged_scores(scores, torch.tensor([100]), 8)
    assert set(merged[0].argsort(descending=True)[:8].tolist()) == set(range(92, 100))


@pytest.mark.usefixtures("backend")
def test_minus_infinity_and_nan_rank_last() -> None:
    scores = torch.tensor([[[torch.nan, 1.0, -torch.inf, 0.5, 2.0]]])
    assert merged_scores(scores, torch.tensor([4]), 4).tolist() == [[2.0, 4.0, 1.0, 3.0, 0.0]]


def structured(kind: str, *shape: int) -> torch.Tensor:
    scores = torch.randn(shape)
    if kind == "ties":
        return scores.mul(3).round()
    if kind == "equal":
        return torch.zeros(shape)
    if kind == "alike":  # so the upper tiers have few tokens
        return scores[:, :1] + 0.01 * scores
    return scores.masked_fill(scores < 0.5, -torch.inf) if kind == "holes" else scores


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in {"_SAMPLE": (16, 16), "_PART": (32, 32), "_PROGRAMS": 16}.items():
        monkeypatch.setattr(filtering, name, value)
    for name, value in {"_BLOCK_M": 32, "_BLOCK_N": 32, "_PLACES": 16, "_PART": 32}.items():
        monkeypatch.setattr(kernels, name, value)
    return monkeypatch


KINDS = pytest.mark.parametrize("kind", ["random", "ties", "equal", "alike", "holes"])


@KINDS
@pytest.mark.parametrize("margin", [4.5, 0.0], ids=["enough candidates", "too few"])
def test_the_backends_agree_on_long_lists_and_parts_of_the_heads(
    kind: str, margin: float, small_tiles: pytest.MonkeyPatch
) -> None:
    """Lists that are longer than a tile, of any strides; these are the third and fourth of eight heads."""
    small_tiles.setattr(filtering, "_MARGIN", margin)
    scores = structured(kind, 2, 2, 150).permute(2, 1, 0).contiguous().permute(2, 1, 0)
    limits = torch.tensor([160, 130])
    for k in (7, 70):
        expected = in_torch.merge(scores, limits, k, 10, 2, 8)
        assert torch.equal(kernels.merge(scores, limits, k, 10, 2, 8), expected)


@KINDS
@pytest.mark.parametrize("depth", [12, 1], ids=["deep", "shallow"])
def test_the_list_is_that_of_the_merged_scores(kind: str, depth: int, small_tiles: pytest.MonkeyPatch) -> None:
    """Whether the upper tiers have enough tokens or not; rows that are shorter than the list have all their tokens."""
    small_tiles.setattr(kernels, "_DEPTH", depth)
    scores = structured(kind, 3, 3, 150)
    lengths = torch.tensor([150, 170, 44])
    for most, first, last in ((40, 4, 10), (40, 0, 0), (45, 0, 44), (16, 4, 12)):
        merged = merged_scores(scores, lengths, most - last, spared=last)
        expected, expected_counts = top_pages(merged[:, None], lengths, most, first=first, last=last)
        for backend in (in_torch, kernels):
            pages, counts = backend.merged_list(scores, lengths, most, first, last)
            listed = leading(pages, counts)
            assert torch.equal(counts, expected_counts) and torch.equal(pages[listed], expected[listed])
            assert ((pages >= 0) & (pages < 150)).all()


def test_a_list_of_more_tokens_than_there_are() -> None:
    for backend in (in_torch, kernels):
        pages, counts = backend.merged_list(torch.randn(1, 2, 20), torch.tensor([20]), 30, 2, 5)
        assert pages.tolist() == [[list(range(20))]] and counts.tolist() == [[20]]


def test_no_host_sync() -> None:
    with FakeTensorMode():
        assert merged_scores(torch.empty(2, 3, 100), torch.empty(2, dtype=torch.int64), 7).shape == (2, 100)


@pytest.mark.usefixtures("small_tiles")
def test_the_kernel_declares_what_it_does() -> None:
    scores, limits = torch.randn(1, 2, 40), torch.tensor([30])
    for op, arguments in ((kernels.merge, (7, 0, 0, 3)), (kernels.merged_list, (7, 1, 2))):
        torch.library.opcheck(op.op, (scores, limits, *arguments), test_utils=("test_schema", "test_faketensor"))
