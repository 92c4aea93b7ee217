"""PyTorch backend of the means."""

import torch
import torch.nn.functional as F

from sparse_patch.kernels.slices import slices
from sparse_patch.ops.layout import key_blocks, query_blocks
from sparse_patch.plans import BlockGrid


def key_means(k: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """See `ops.selection.block_means`."""
    return _means(key_blocks(k, grid), grid.key_block_tokens)


def key_similarities(k: torch.Tensor, grid: BlockGrid, center: torch.Tensor) -> torch.Tensor:
    """See `ops.selection.block_means`."""
    position = torch.arange(grid.num_key_blocks * grid.block_size, device=k.device)
    real = (position < grid.lengths[:, None]).unflatten(-1, (-1, grid.block_size))
    return _similarities(key_blocks(k, grid), real, center)


def query_means(q: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """See `ops.selection.block_means`."""
    begin, end = grid.query_bounds
    return _means(query_blocks(q, grid), end - begin)


def query_means_and_similarities(q: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.block_means`."""
    return query_means(q, grid), _similarities(query_blocks(q, grid), grid.query_is_real, None)


def _means(blocks: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Means of blocks `[B, H, N, block, D]` whose empty slots are 0; each has `tokens`, int64 `[B, N]`, tokens."""
    return blocks.sum(-2, dtype=torch.float32) / tokens.clamp(min=1)[:, None, :, None]


def _similarities(blocks: torch.Tensor, real: torch.Tensor, center: torch.Tensor | None) -> torch.Tensor:
    """Self-similarities of blocks `[B, H, N, block, D]` minus `center` `[B, H, D]`; `real` slots: `[B, N, block]`."""
    batch, heads, number, block, head_dim = blocks.shape
    similarities = torch.empty(batch, heads, number, device=blocks.device)
    for part in slices(number, 8 * batch * heads * block * head_dim):
        x, slots = blocks[:, :, part].float(), real[:, part]
        if center is not None:
            x = x - center[:, :, None, None]
        total = (F.normalize(x, dim=-1) * slots[:, None, ..., None]).sum(-2)
        similarities[:, :, part] = total.square().sum(-1) / slots.sum(-1).clamp(min=1).square()[:, None]
    return similarities
