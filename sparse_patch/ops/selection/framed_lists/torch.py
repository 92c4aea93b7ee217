"""PyTorch backend of the framed lists."""

import torch

from sparse_patch.ops.selection.framed_lists.frame import Frame


def framed_pages(
    blocks: torch.Tensor, counts: torch.Tensor, lengths: torch.Tensor, capacity: int, frame: Frame
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.framed_lists`."""
    per_block, first, page_size = frame.per_block, frame.first, frame.page_size
    between = (-(-(lengths - frame.spared) // frame.block_size)).clamp(min=0)[:, None] * per_block
    in_blocks = counts.long() * per_block  # pages of the chosen blocks; `between` counts those of all blocks
    slot = torch.arange(frame.size(blocks.shape[-1]), device=blocks.device).expand(*counts.shape, -1)
    number, within = (slot - first).clamp(min=0) // per_block, (slot - first) % per_block
    chosen = first + blocks.gather(-1, number.clamp(max=blocks.shape[-1] - 1)) * per_block + within
    window = slot + (between - in_blocks)[..., None]
    pages = torch.where(slot < first + in_blocks[..., None], torch.where(slot < first, slot, chosen), window)
    read = -(-lengths[:, None] // page_size) - between + in_blocks
    return pages.clamp(max=-(-capacity // page_size) - 1).int(), read.int()
