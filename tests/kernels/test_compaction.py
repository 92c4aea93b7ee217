"""Lists of marked values, in Triton and in PyTorch, against Python's lists."""

from types import ModuleType

import pytest
import torch

from sparse_patch.kernels.compaction import torch as in_torch
from sparse_patch.kernels.compaction import triton as in_triton


@pytest.mark.parametrize("backend", [in_torch, in_triton], ids=["torch", "triton"])
@pytest.mark.parametrize("length", [1, 7, 1500])
def test_marked_values_in_order(backend: ModuleType, length: int) -> None:
    marked = torch.rand(2, 2, 2, length) < 0.4
    values = torch.randint(0, 99, (2, 2, 1, length), dtype=torch.int32).expand(-1, -1, 2, -1)
    lists, counts = backend.compact(marked, values)
    assert lists.dtype == counts.dtype == torch.int32 and counts.shape == (2, 2, 2)
    for row in range(8):
        place = row // 4, row // 2 % 2, row % 2
        assert lists[place][: counts[place]].tolist() == values[place][marked[place]].tolist()
