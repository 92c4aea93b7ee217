"""The selection ops of decode on a GPU: kernels against PyTorch, and inside CUDA graphs; skipped without a GPU."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from builders.gpu import no_waits, on_gpu
from calls import make_call

from sparse_patch.call import AttentionCall, KVState
from sparse_patch.ops.selection.page_scores import page_scores
from sparse_patch.ops.selection.page_scores.torch import page_scores as page_scores_in_torch
from sparse_patch.ops.selection.page_statistics import bound_scores, mean_scores, page_bounds, page_means
from sparse_patch.ops.selection.page_statistics import torch as statistics_in_torch
from sparse_patch.ops.selection.rank_merge import merged_list, merged_scores
from sparse_patch.ops.selection.rank_merge import torch as rank_merge_in_torch
from sparse_patch.ops.selection.top_pages import top_pages
from sparse_patch.ops.selection.top_pages import triton as kernels
from sparse_patch.ops.selection.top_pages.torch import top_pages as top_pages_in_torch

pytestmark = pytest.mark.gpu
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("heads, size", [(1, 1), (7, 1000), (28, 4097), (32, 32768), (40, 131)])
def test_page_scores(page_size: int, heads: int, size: int) -> None:
    lengths = torch.tensor([size, size // 2, 1, 0], device="cuda")
    logits = 3 * torch.randn(4, heads, size, device="cuda")
    lse = logits.logsumexp(-1)
    logits.masked_fill_((torch.arange(size, device="cuda") >= lengths[:, None])[:, None], NAN)
    expected = page_scores_in_torch(logits, lse, lengths, page_size)
    torch.testing.assert_close(page_scores(logits, lse, lengths, page_size), expected, atol=1e-6, rtol=1e-5)


def assert_same_lists(scores: torch.Tensor, limits: torch.Tensor, k: int) -> None:
    pages, counts = top_pages(scores, limits, k)
    expected, expected_counts = top_pages_in_torch(
        scores, (limits if limits.ndim == 2 else limits[:, None]).expand(scores.shape[:2]), min(k, scores.shape[-1])
    )
    assert torch.equal(counts, expected_counts)
    listed = torch.arange(pages.shape[-1], device="cuda") < counts[..., None]
    assert torch.equal(pages.where(listed, 0), expected.where(listed, 0))
    assert ((pages >= 0) & (pages < scores.shape[-1])).all()


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "holes", "forced", "plateau"])
@pytest.mark.parametrize("size", [1, 33, 513, 2048, 8192, 16384, 16385, 131072])
def test_top_pages(kind: str, size: int) -> None:
    scores = torch.randn(3, 4, size, device="cuda")
    if kind == "ties":
        scores = (scores * 2).round()
    elif kind == "plateau":
        scores.clamp_(min=2.0)
    elif kind == "equal":
        scores.zero_()
    elif kind == "holes":
        scores[torch.rand_like(scores) < 0.7] = -INF
        scores[torch.rand_like(scores) < 0.1] = NAN
    elif kind == "forced":
        scores = scores.exp()
        scores[..., -9:-1] = INF
    for k in (1, 64, 128, 1000, 6000, 20000):
        assert_same_lists(scores, torch.tensor([size, size // 2, 3], device="cuda"), k)
    assert_same_lists(scores, torch.randint(0, size + 1, (3, 4), device="cuda"), 512)


def test_the_kernel_serves_what_methods_ask_for() -> None:
    for size, k in ((8192, 64), (16384, 1024), (131072, 512), (131072, 6144), (1 << 20, 16384)):
        assert kernels.why_unsupported(torch.empty(1, 1, size, device="meta"), k) is None


def test_first_and_last_pages_come_first() -> None:
    scores, tokens = torch.randn(2, 4, 9000, device="cuda"), torch.tensor([9000 * 16, 5003 * 16 + 5], device="cuda")
    real = (tokens - 21 + 15) // 16
    pages, counts = top_pages(scores, tokens, 100, 16, spared=21, first=3, last=5)
    expected, expected_counts = top_pages_in_torch(scores, real[:, None].expand(2, 4), 100, 3, 5)
    assert torch.equal(pages, expected) and torch.equal(counts, expected_counts)


def test_merged_scores() -> None:
    scores, limits = torch.randn(2, 8, 5000), torch.tensor([5000, 777])
    assert torch.equal(merged_scores(scores.cuda(), limits.cuda(), 300).cpu(), merged_scores(scores, limits, 300))


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "alike", "holes"])
@pytest.mark.parametrize("size, most", [(3000, 2048), (32768, 2048), (131072, 300)])
def test_merged_list(kind: str, size: int, most: int) -> None:
    """Whether heads choose alike, so that few of their tokens differ, or not; the kernels' order does not matter."""
    scores = torch.randn(2, 32, size, device="cuda")
    if kind == "ties":
        scores = scores.mul(8).round()
    elif kind == "equal":
        scores.zero_()
    elif kind == "alike":
        scores = scores[:, :1] + 1e-3 * scores
    elif kind == "holes":
        scores[scores < 1] = -INF
    lengths = torch.tensor([size, size // 2 + 1], device="cuda")
    merged = rank_merge_in_torch.merge(scores, lengths, most - 100, 100, 0, 32)
    assert torch.equal(merged_scores(scores, lengths, most - 100, spared=100), merged)
    expected, expected_counts = top_pages_in_torch(merged[:, None].clone(), lengths[:, None], most, 4, 100)
    for _ in range(3):
        pages, counts = merged_list(scores, lengths, most, first=4, last=100)
        assert torch.equal(counts, expected_counts)
        listed = torch.arange(most, device="cuda") < counts[..., None]
        assert torch.equal(pages.where(listed, 0), expected.where(listed, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (7, 1), (32, 1)], ids=str)
def test_statistics_and_scores(dtype: torch.dtype, head_dim: int, heads: tuple[int, int]) -> None:
    call = make_call(777, row_starts=[0, 5, 600], dtype=dtype, head_dim=head_dim, heads=heads)
    bounds, means = KVState(), KVState()
    for begin, end in ((0, 500), (500, 776), (776, 777)):
        chunk = replace(on_gpu(call), q=call.q[:, :, begin:end].cuda(), k=call.k[:, :, :end].cuda(), q_start=begin)
        low, high = page_bounds(replace(chunk, kv_state=bounds), 16)
        mean = page_means(replace(chunk, kv_state=means), 16, 4)
    expected_low, expected_high = page_bounds(replace(call, kv_state=None), 16)
    expected_mean = page_means(replace(call, kv_state=None), 16, 4)
    lengths, q = call.lengths(), call.q[:, :, -1]
    for row, length in enumerate(lengths.tolist()):
        real, real_means = -(-length // 16), max(0, -(-(length - 4) // 16))
        assert torch.equal(low[row, :, :real].cpu(), expected_low[row, :, :real])
        assert torch.equal(high[row, :, :real].cpu(), expected_high[row, :, :real])
        torch.testing.assert_close(
            mean[row, :, :real_means].cpu(), expected_mean[row, :, :real_means], atol=1e-2, rtol=1e-2
        )
    tolerance = {"atol": 1e-2, "rtol": 1e-4}
    torch.testing.assert_close(
        bound_scores(q.cuda(), low, high, lengths.cuda(), 16).cpu(),
        statistics_in_torch.bound_scores(q, low.cpu(), high.cpu(), lengths, 16),
        **tolerance,
    )
    torch.testing.assert_close(
        mean_scores(q.cuda(), mean, lengths.cuda(), 16, 4).cpu(),
        statistics_in_torch.mean_scores(q, mean.cpu(), lengths, 16, 4),
        **tolerance,
    )


def captured(step: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    """A step as a CUDA graph, and the tensors that a replay writes."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


def test_a_decode_step_in_a_cuda_graph() -> None:
    """One graph serves every length of a static cache; statistics, scores and lists follow the device's counter."""
    buffer = torch.full((2, 2, 400, 64), NAN, dtype=torch.bfloat16, device="cuda")
    starts, end = torch.tensor([0, 37], device="cuda"), torch.tensor(200, device="cuda")
    buffer[:, :, :200] = torch.randn(2, 2, 200, 64, device="cuda")
    q = torch.randn(2, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    kv_state = KVState()

    def call(kept: KVState | None) -> AttentionCall:
        return AttentionCall(q, buffer, buffer, 1.0, 0, "decode", kv_start=starts, kv_end=end, kv_state=kept)

    def step(kept: KVState | None) -> tuple[torch.Tensor, ...]:
        lengths = end - starts
        scores = bound_scores(q[:, :, 0], *page_bounds(call(kept), 16), lengths, 16)
        return (scores, *top_pages(scores, (lengths + 15) // 16, 6))

    page_bounds(call(kv_state), 16)
    graph, outputs = captured(lambda: step(kv_state))
    for new in range(200, 300):
        buffer[:, :, new] = torch.randn(2, 2, 64, device="cuda")
        q.normal_()
        end.fill_(new + 1)
        graph.replay()
        for output, expected in zip(outputs, step(None), strict=True):
            assert torch.equal(output, expected)


def test_no_op_waits_for_the_gpu() -> None:
    call = on_gpu(make_call(900, row_starts=[0, 77], head_dim=64))
    call = replace(call, q=call.q[:, :, -1:], q_start=899, kv_state=KVState())
    lengths, logits = call.lengths(), torch.randn(2, 4, 900, device="cuda")

    def step() -> None:
        low, high = page_bounds(call, 16)
        bound_scores(call.q[:, :, -1], low, high, lengths, 16)
        mean_scores(call.q[:, :, -1], page_means(replace(call, kv_state=None), 16, 4), lengths, 16, 4)
        top_pages(page_scores(logits, logits.logsumexp(-1), lengths, 16)[:, None], lengths // 16, 20)
        merged_scores(logits, lengths, 64)
        merged_list(logits, lengths, 64, first=4, last=16)

    step()
    with no_waits():
        step()
