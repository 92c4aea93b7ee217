"""Means over blocks, in Triton and in PyTorch, against means of slices."""

from types import ModuleType

import pytest
import torch
from calls import make_call

from sparse_patch.ops.block_means import torch as in_torch
from sparse_patch.ops.block_means import triton as in_triton
from sparse_patch.plans import BlockGrid


@pytest.mark.parametrize("backend", [in_torch, in_triton], ids=["torch", "triton"])
@pytest.mark.parametrize("queries", [150, 100, 37])
@pytest.mark.parametrize("row_starts", [None, [0, 5, 64, 120]])
def test_means_of_blocks(backend: ModuleType, queries: int, row_starts: list[int] | None) -> None:
    call = make_call(150, queries=queries, row_starts=row_starts, head_dim=24)
    grid = BlockGrid.of(call, 32)
    keys, queries_ = backend.key_means(call.k, grid), backend.query_means(call.q, grid)
    assert keys.dtype == queries_.dtype == torch.float32
    for row, start in enumerate(row_starts or [0]):
        for block in range(grid.num_key_blocks):
            part = call.k[row, :, start + 32 * block : start + 32 * (block + 1)]
            expected = part.mean(-2) if part.shape[1] else torch.zeros_like(keys[row, :, block])
            torch.testing.assert_close(keys[row, :, block], expected)
        begin, end = (bound[row].tolist() for bound in grid.query_bounds)
        for block in range(grid.num_query_blocks):
            shift = start - call.q_start
            part = call.q[row, :, begin[block] + shift : end[block] + shift]
            expected = part.mean(-2) if end[block] > begin[block] else torch.zeros_like(queries_[row, :, block])
            torch.testing.assert_close(queries_[row, :, block], expected)
