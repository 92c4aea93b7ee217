"""PyTorch backend of the means."""

import torch

from sparse_patch.ops.layout import key_blocks, query_blocks
from sparse_patch.plans import BlockGrid


def key_means(k: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """See `ops.block_means`."""
    last = grid.lengths[:, None] - torch.arange(grid.num_key_blocks, device=k.device) * grid.block_size
    count = last.clamp(1, grid.block_size)[:, None, :, None]
    return key_blocks(k, grid).sum(-2, dtype=torch.float32) / count


def query_means(q: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """See `ops.block_means`."""
    begin, end = grid.query_bounds
    count = (end - begin).clamp(min=1)[:, None, :, None]
    return query_blocks(q, grid).sum(-2, dtype=torch.float32) / count
