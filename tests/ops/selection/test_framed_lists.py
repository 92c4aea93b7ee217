"""Lists of sinks, blocks and a window, in Triton and in PyTorch, against the tokens written out."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_patch.ops.selection.framed_lists import Frame
from sparse_patch.ops.selection.framed_lists import framed_pages as op
from sparse_patch.ops.selection.framed_lists.torch import framed_pages as in_torch
from sparse_patch.ops.selection.framed_lists.triton import framed_pages as in_triton
from sparse_patch.ops.selection.framed_lists.triton import write_lists

FRAMES = [Frame(4, 16, 20), Frame(0, 8, 1), Frame(5, 4, 7), Frame(16, 4, 33), Frame(8, 64, 64)]


def tokens_of(frame: Frame, blocks: list[int], length: int) -> set[int]:
    number = max((length - frame.sink - frame.window) // frame.block_size, 0)
    chosen = {frame.sink + block * frame.block_size + i for block in blocks for i in range(frame.block_size)}
    return {*range(min(frame.sink, length)), *chosen, *range(frame.sink + number * frame.block_size, length)}


@pytest.mark.parametrize("backend", [in_torch, in_triton], ids=["torch", "triton"])
@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_tokens(backend: object, frame: Frame) -> None:
    lengths = [frame.sink + frame.window, frame.sink + frame.window + frame.block_size, 150, 157, 400]
    number = [max((length - frame.sink - frame.window) // frame.block_size, 0) for length in lengths]
    most = 3
    blocks, counts = torch.full((len(lengths), 2, most), 7), torch.empty(len(lengths), 2, dtype=torch.int32)
    for row, n in enumerate(number):
        for i in range(2):
            counts[row, i] = min(n, most)
            blocks[row, i, : counts[row, i]] = torch.randperm(n)[:most].sort().values
    blocks = blocks.int()
    pages, read = backend(blocks, counts, torch.tensor(lengths), 410, frame)  # type: ignore[operator]
    assert pages.dtype == read.dtype == torch.int32
    assert ((pages >= 0) & (pages * frame.page_size < 410)).all()
    for row, length in enumerate(lengths):
        for i in range(2):
            listed = pages[row, i, : read[row, i]].tolist()
            tokens = {page * frame.page_size + t for page in listed for t in range(frame.page_size)}
            assert len(set(listed)) == len(listed) == read[row, i] and all(p * frame.page_size < length for p in listed)
            expected = tokens_of(frame, blocks[row, i, : counts[row, i]].tolist(), length)
            assert {t for t in tokens if t < length} == expected


def test_the_backends_give_equal_lists_of_any_strides() -> None:
    blocks = torch.arange(9, dtype=torch.int32)[:, None, None].expand(9, 2, 3).permute(2, 1, 0)
    counts, lengths = torch.tensor([[9, 2, 5]] * 2, dtype=torch.int32).t(), torch.tensor(500).expand(3)
    arguments = blocks, counts, lengths, 600, FRAMES[0]
    for found, expected in zip(in_triton(*arguments), in_torch(*arguments), strict=True):
        assert torch.equal(found, expected)


def test_no_host_sync() -> None:
    with FakeTensorMode():
        blocks = torch.empty(2, 3, 7, dtype=torch.int32)
        pages, read = op(blocks, blocks[..., 0], torch.empty(2, dtype=torch.int64), 300, FRAMES[0])
        assert pages.shape == (2, 3, 1 + 7 * 4 + 9) and read.shape == (2, 3)


def test_the_kernel_declares_what_it_does() -> None:
    blocks = torch.tensor([[[1, 3], [0, 2]]], dtype=torch.int32)
    arguments = blocks, torch.tensor([[2, 1]], dtype=torch.int32), torch.tensor([150]), 160, 4, 16, 20
    torch.library.opcheck(write_lists.op, arguments, test_utils=("test_schema", "test_faketensor"))
