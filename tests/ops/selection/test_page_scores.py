"""Scores of pages, in Triton and in PyTorch, against softmax and sums written out."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_patch.ops.selection.page_scores import page_scores as op
from sparse_patch.ops.selection.page_scores.torch import page_scores as in_torch
from sparse_patch.ops.selection.page_scores.triton import page_scores as in_triton
from sparse_patch.ops.selection.page_scores.triton import score_pages

BACKENDS = pytest.mark.parametrize("backend", [in_torch, in_triton], ids=["torch", "triton"])


def written_out(logits: torch.Tensor, lengths: list[int], page_size: int) -> np.ndarray:
    """Per row: softmax over each head's real tokens, the largest over heads, sums over pages."""
    batch, _, size = logits.shape
    scores = np.full((batch, -(-size // page_size)), -np.inf)
    for row, length in enumerate(lengths):
        z = logits[row, :, :length].double().numpy()
        attention = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
        for page in range(-(-length // page_size)):
            scores[row, page] = attention[:, page * page_size : (page + 1) * page_size].max(0).sum()
    return scores


def random_logits(lengths: list[int], size: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with NaN after each row's end, and the LSE of the logits before it."""
    logits = 3 * torch.randn(len(lengths), heads, size)
    lse = torch.stack([logits[row, :, :length].logsumexp(-1) for row, length in enumerate(lengths)])
    for row, length in enumerate(lengths):
        logits[row, :, length:] = torch.nan
    return logits, lse


@BACKENDS
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("lengths", [[1], [15], [16], [17], [0, 1, 300], [255, 256, 257], [700, 33, 512]], ids=str)
@pytest.mark.parametrize("spare", [0, 5, 300])
def test_scores(backend: object, page_size: int, lengths: list[int], spare: int) -> None:
    logits, lse = random_logits(lengths, max(lengths) + spare, heads=3)
    scores = backend(logits, lse, torch.tensor(lengths), page_size)  # type: ignore[operator]
    assert scores.dtype == torch.float32
    expected = torch.from_numpy(written_out(logits, lengths, page_size)).float()
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=1e-5)


@BACKENDS
def test_any_strides(backend: object) -> None:
    logits, lse = random_logits([90, 100], 110, heads=5)
    lengths = torch.tensor([90, 100])
    strided = torch.full((5, 2, 220), torch.nan)[..., ::2].transpose(0, 1)
    strided.copy_(logits)
    lse_t = lse.t().contiguous().t()
    expected = in_torch(logits, lse, lengths, 16)
    torch.testing.assert_close(backend(strided, lse_t, lengths, 16), expected)  # type: ignore[operator]


def test_a_page_is_the_sum_of_maxima() -> None:
    """Two heads attend to different tokens: the page's score has both, not the larger of two sums."""
    attention = torch.tensor([[[0.6, 0.1, 0.2, 0.1], [0.1, 0.7, 0.1, 0.1]]])
    scores = op(attention.log(), torch.zeros(1, 2), torch.tensor([4]), 2)
    torch.testing.assert_close(scores, torch.tensor([[1.3, 0.3]]))


def test_no_host_sync() -> None:
    with FakeTensorMode():
        scores = op(torch.empty(2, 4, 100), torch.empty(2, 4), torch.empty(2, dtype=torch.int64), 16)
        assert scores.shape == (2, 7)


def test_the_kernel_declares_what_it_does() -> None:
    logits, lse = random_logits([20, 31], 33, heads=3)
    arguments = logits.nan_to_num(), lse, torch.tensor([20, 31]), 16
    torch.library.opcheck(score_pages.op, arguments, test_utils=("test_schema", "test_faketensor"))
