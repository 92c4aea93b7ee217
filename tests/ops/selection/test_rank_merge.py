"""The merged list of all heads, in Triton and in PyTorch, against the merge written out."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_patch.ops.selection import rank_merge as ops
from sparse_patch.ops.selection.rank_merge import merged_scores
from sparse_patch.ops.selection.rank_merge import triton as kernels
from sparse_patch.ops.selection.rank_merge.torch import merge as in_torch
from sparse_patch.ops.selection.top_pages import top_pages


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


@pytest.mark.parametrize("ties", [False, True])
def test_the_backends_agree_on_long_lists_and_parts_of_the_heads(ties: bool) -> None:
    """Lists that are longer than a tile, of any strides; these are the third and fourth of eight heads."""
    scores = torch.randn(700, 2, 3).permute(2, 1, 0)
    scores = scores.mul(3).round() if ties else scores
    lists = top_pages(scores, torch.tensor([700, 650, 20]), 600)
    expected = in_torch(scores, *lists, 600, 2, 8)
    assert torch.equal(kernels.merge(scores, *lists, 600, 2, 8), expected)


def test_no_host_sync() -> None:
    with FakeTensorMode():
        assert merged_scores(torch.empty(2, 3, 100), torch.empty(2, dtype=torch.int64), 7).shape == (2, 100)


def test_the_kernel_declares_what_it_does() -> None:
    scores = torch.randn(2, 3, 40)
    arguments = scores, *top_pages(scores, torch.tensor([40, 20]), 7), 7, 0, 3
    torch.library.opcheck(kernels.merge.op, arguments, test_utils=("test_schema", "test_faketensor"))
