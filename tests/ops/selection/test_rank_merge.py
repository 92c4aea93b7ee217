"""The merged list of all heads, against the merge written out."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_patch.ops.selection.rank_merge import merged_ranks
from sparse_patch.ops.selection.top_pages import top_pages


def merge(scores: list[list[float]], limit: int, k: int) -> list[int]:
    """Merge the heads' top k rank by rank; list each token once and keep the first k."""
    order = [sorted(range(limit), key=lambda i: (-head[i], i))[:k] for head in scores]
    merged = [head[rank] for rank in range(min(k, limit)) for head in order]
    return list(dict.fromkeys(merged))[:k]


@pytest.mark.parametrize("size, limits, k", [(1, [1], 1), (50, [50, 33], 10), (50, [49, 3], 20), (9, [9, 0], 12)])
@pytest.mark.parametrize("ties", [False, True])
def test_the_smallest_ranks_are_the_merged_list(size: int, limits: list[int], k: int, ties: bool) -> None:
    scores = torch.randn(len(limits), 4, size)
    if ties:
        scores = scores.round()
    for row, limit in enumerate(limits):
        scores[row, :, limit:] = torch.nan
    ranks = merged_ranks(scores, torch.tensor(limits), k)
    assert ranks.dtype == torch.float32 and ranks.shape == (len(limits), size)
    pages, counts = top_pages(-ranks[:, None], torch.tensor(limits), k)
    for row, limit in enumerate(limits):
        expected = merge(scores[row].tolist(), limit, k)
        assert ranks[row].argsort(stable=True)[: len(expected)].tolist() == expected
        assert pages[row, 0, : counts[row, 0]].tolist() == sorted(expected)
        finite = ranks[row][ranks[row].isfinite()]
        assert len(finite.unique()) == len(finite) >= len(expected)


def test_the_favourite_of_a_head_is_in() -> None:
    scores = torch.zeros(1, 8, 100)
    for head in range(8):
        scores[0, head, 99 - head] = 1e-3
    ranks = merged_ranks(scores, torch.tensor([100]), 8)
    assert set(ranks[0].argsort()[:8].tolist()) == set(range(92, 100))


def test_minus_infinity_and_nan_rank_last() -> None:
    scores = torch.tensor([[[torch.nan, 1.0, -torch.inf, 0.5, 2.0]]])
    assert merged_ranks(scores, torch.tensor([4]), 4).tolist() == [[2.0, 0.0, 3.0, 1.0, torch.inf]]


def test_no_host_sync() -> None:
    with FakeTensorMode():
        assert merged_ranks(torch.empty(2, 3, 100), torch.empty(2, dtype=torch.int64), 7).shape == (2, 100)
