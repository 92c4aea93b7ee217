"""Means and self-similarities of blocks, in Triton and in PyTorch, against those of slices."""

from types import ModuleType

import pytest
import torch
from calls import make_call

from sparse_patch.kernels import slices
from sparse_patch.ops.selection.block_means import torch as in_torch
from sparse_patch.ops.selection.block_means import triton as in_triton
from sparse_patch.ops.selection.pooling import mean_of_rows
from sparse_patch.plans import BlockGrid

BACKENDS = pytest.mark.parametrize("backend", [in_torch, in_triton], ids=["torch", "triton"])


def similarity(tokens: torch.Tensor) -> torch.Tensor:
    """Mean cosine of all pairs of tokens `[H, n, D]`: `[H]`."""
    unit = tokens.double() / tokens.double().norm(dim=-1, keepdim=True)
    return (unit @ unit.mT).sum((1, 2)).float() / max(tokens.shape[1], 1) ** 2


@BACKENDS
@pytest.mark.parametrize("queries", [150, 100, 37])
@pytest.mark.parametrize("row_starts", [None, [0, 5, 64, 120]])
def test_means_and_similarities_of_blocks(backend: ModuleType, queries: int, row_starts: list[int] | None) -> None:
    call = make_call(150, queries=queries, heads=(2, 1), row_starts=row_starts, head_dim=24)
    grid = BlockGrid.of(call, 32)
    keys, queries_ = backend.key_means(call.k, grid), backend.query_means(call.q, grid)
    same_queries, alike_queries = backend.query_means_and_similarities(call.q, grid)
    center = mean_of_rows(keys, grid.key_block_tokens)
    alike_keys = backend.key_similarities(call.k, grid, center)
    assert keys.dtype == queries_.dtype == alike_keys.dtype == alike_queries.dtype == torch.float32
    assert torch.equal(same_queries, queries_)
    for row, start in enumerate(row_starts or [0]):
        torch.testing.assert_close(center[row], call.k[row, :, start:].mean(-2))
        for block in range(grid.num_key_blocks):
            part = call.k[row, :, start + 32 * block : start + 32 * (block + 1)]
            expected = part.mean(-2) if part.shape[1] else torch.zeros_like(keys[row, :, block])
            torch.testing.assert_close(keys[row, :, block], expected)
            torch.testing.assert_close(alike_keys[row, :, block], similarity(part - center[row, :, None]))
        begin, end = (bound[row].tolist() for bound in grid.query_bounds)
        for block in range(grid.num_query_blocks):
            shift = start - call.q_start
            part = call.q[row, :, begin[block] + shift : end[block] + shift]
            expected = part.mean(-2) if end[block] > begin[block] else torch.zeros_like(queries_[row, :, block])
            torch.testing.assert_close(queries_[row, :, block], expected)
            torch.testing.assert_close(alike_queries[row, :, block], similarity(part))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_similarities_are_1_for_one_direction_and_0_for_nothing(backend: ModuleType, dtype: torch.dtype) -> None:
    call = make_call(96, heads=(2, 2), dtype=dtype)
    grid = BlockGrid.of(call, 32)
    call.q[:, 0] = torch.arange(1, 97, dtype=dtype)[:, None] * torch.linspace(-1, 1, 16, dtype=dtype) / 32
    call.q[:, 1] = 0
    call.k[:] = call.q  # a key minus itself is zero
    center = call.k[:, :, 40].float()
    alike = backend.query_means_and_similarities(call.q, grid)[1]
    torch.testing.assert_close(alike, torch.tensor([1.0, 0.0])[None, :, None].expand(1, 2, 3), atol=1e-6, rtol=1e-3)
    alike = backend.key_similarities(call.k, grid, center)
    # Around key 40 the head's first block points one way, the last one the other way; in the middle one, 8 keys and 23.
    expected = torch.tensor([[1.0, (15 / 32) ** 2, 1.0], [0.0] * 3])[None]
    torch.testing.assert_close(alike, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("budget", [1, 100_000])
def test_the_size_of_the_slices_changes_nothing(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(150, queries=100, row_starts=[0, 5])
    grid = BlockGrid.of(call, 32)
    center = call.k.mean(-2)

    def similarities() -> list[torch.Tensor]:
        of_queries = in_torch.query_means_and_similarities(call.q, grid)[1]
        return [of_queries, in_torch.key_similarities(call.k, grid, center)]

    expected = similarities()
    monkeypatch.setattr(slices, "SLICE_BYTES", budget)
    for ours, theirs in zip(similarities(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


def test_the_kernel_reads_any_strides() -> None:
    call = make_call(100)
    grid = BlockGrid.of(call, 32)
    across = in_triton.query_means_and_similarities(call.q.mT.contiguous().mT, grid)
    for ours, theirs in zip(across, in_triton.query_means_and_similarities(call.q, grid), strict=True):
        assert torch.equal(ours, theirs)
