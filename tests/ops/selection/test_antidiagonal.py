"""The Triton kernel of the antidiagonal masses against PyTorch, which `test_xattention.py` compares with the oracle."""

import pytest
import torch
from calls import make_call

from sparse_patch.call import AttentionCall
from sparse_patch.kernels import slices
from sparse_patch.ops.selection.antidiagonal import block_masses
from sparse_patch.plans import BlockGrid

# The CPU multiplies half precision in float32, and so does the interpreter, from the same inputs.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-5}


def assert_matches(call: AttentionCall, block_size: int, stride: int) -> None:
    grid = BlockGrid.of(call, block_size)
    expected, masses = (list(block_masses(call, grid, stride, backend)) for backend in ("torch", "triton"))
    for (rows, theirs), (same_rows, ours) in zip(expected, masses, strict=True):
        assert rows == same_rows and ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE[call.q.dtype], rtol=1e-4)


@pytest.mark.parametrize("block_size, stride", [(16, 1), (16, 4), (16, 16), (32, 8), (64, 4), (128, 1), (128, 16)])
@pytest.mark.parametrize("length", [1, 17, 128, 200])
def test_blocks_strides_and_lengths(block_size: int, stride: int, length: int) -> None:
    assert_matches(make_call(length), block_size, stride)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("queries", [300, 96, 33, 1])
def test_padding_chunks_and_softcap(softcap: float | None, queries: int) -> None:
    assert_matches(make_call(300, queries=queries, row_starts=[0, 5, 64, 290], softcap=softcap), 32, 8)


@pytest.mark.parametrize("heads, head_dim", [((4, 1), 80), ((7, 1), 16), ((4, 2), 128), ((3, 3), 40)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_groups_head_dims_and_dtypes(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    assert_matches(make_call(100, heads=heads, head_dim=head_dim, dtype=dtype), 32, 8)


@pytest.mark.parametrize("budget", [1500, 4000])
def test_slices(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches that begin inside the grid."""
    monkeypatch.setattr(slices, "SLICE_BYTES", budget)
    assert_matches(make_call(300, queries=211, row_starts=[0, 37]), 32, 8)


def test_the_kernel_reads_any_strides() -> None:
    call = make_call(200)
    across = AttentionCall(**{**vars(call), "q": call.q.mT.contiguous().mT, "k": call.k.mT.contiguous().mT})
    grid = BlockGrid.of(call, 32)
    for (_, expected), (_, masses) in zip(
        block_masses(call, grid, 8, "triton"), block_masses(across, grid, 8, "triton"), strict=True
    ):
        assert torch.equal(expected, masses)
