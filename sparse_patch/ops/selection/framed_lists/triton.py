"""Triton kernel of the framed lists: a program writes a part of a list."""

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import launch_op
from sparse_patch.ops.selection.framed_lists.frame import Frame


def framed_pages(
    blocks: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor, capacity: int, frame: Frame
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.framed_lists`."""
    return write_lists(blocks, counts, lengths, capacity, frame.sink, frame.block_size, frame.window)


def _outputs(
    blocks: torch.Tensor, counts: torch.Tensor, sink: int, block_size: int, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    size = Frame(sink, block_size, window).size(blocks.shape[-1])
    return blocks.new_empty(*counts.shape, size), torch.empty_like(counts, memory_format=torch.contiguous_format)


@launch_op("framed_lists", _outputs)
def write_lists(
    blocks: torch.Tensor,
    counts: torch.Tensor,
    lengths: torch.Tensor,
    capacity: int,
    sink: int,
    block_size: int,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's launch."""
    frame = Frame(sink, block_size, window)
    pages, read = _outputs(blocks, counts, sink, block_size, window)
    lists, size = counts.shape[1], pages.shape[-1]
    block = min(1024, max(32, triton.next_power_of_2(size)))
    _list_kernel[(triton.cdiv(size, block), counts.numel())](
        blocks,
        counts,
        lengths,
        pages,
        read,
        blocks.stride(),
        counts.stride(),
        lengths.stride(0),
        lists,
        size,
        frame.spared,
        frame.first,
        triton.cdiv(capacity, frame.page_size) - 1,
        P=frame.page_size,
        PER_BLOCK=frame.per_block,
        BLOCK=block,
        num_warps=max(1, block // 256),
    )
    return pages, read


@jit(["lists", "size", "spared", "first", "greatest"])
def _list_kernel(
    blocks, counts, lengths, pages, read, block_strides, count_strides, stride_length,
    lists, size, spared, first, greatest, P: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_t, i_list = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_b, i_l = i_list // lists, i_list % lists
    stride_b, stride_l, stride_n = block_strides
    stride_cb, stride_cl = count_strides
    length = tl.load(lengths + i_b * stride_length).to(tl.int32)
    in_blocks = tl.load(counts + i_b * stride_cb + i_l * stride_cl) * PER_BLOCK  # pages of the chosen blocks
    between = tl.cdiv(tl.maximum(length - spared, 0), P * PER_BLOCK) * PER_BLOCK  # pages of all blocks
    slot = i_t * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    chosen = (slot >= first) & (slot < first + in_blocks)  # [BLOCK]
    number = ((slot - first) // PER_BLOCK).to(tl.int64)  # [BLOCK]
    block = tl.load(blocks + i_b * stride_b + i_l * stride_l + number * stride_n, mask=chosen, other=0)  # [BLOCK]
    of_block = first + block * PER_BLOCK + (slot - first) % PER_BLOCK  # [BLOCK]
    page = tl.where(chosen, of_block, tl.where(slot < first, slot, slot + between - in_blocks))  # [BLOCK]
    tl.store(pages + i_list * size + slot, tl.minimum(page, greatest), mask=slot < size)
    tl.store(read + i_list, tl.cdiv(length, P) - between + in_blocks, mask=i_t == 0)
