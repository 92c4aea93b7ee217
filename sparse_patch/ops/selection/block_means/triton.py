"""Triton kernel of the means: one program reads one block in place, whatever its strides and its row's padding."""

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import by_row, launch_op
from sparse_patch.plans import BlockGrid


def key_means(k: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """See `ops.selection.block_means`."""
    return block_means(k, *_of_keys(grid), None, grid.num_key_blocks, grid.block_size, True, False)[0]


def key_similarities(k: torch.Tensor, grid: BlockGrid, center: torch.Tensor) -> torch.Tensor:
    """See `ops.selection.block_means`."""
    return block_means(k, *_of_keys(grid), center, grid.num_key_blocks, grid.block_size, False, True)[1]


def query_means(q: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """See `ops.selection.block_means`."""
    return block_means(q, *_of_queries(grid), None, grid.num_query_blocks, grid.block_size, True, False)[0]


def query_means_and_similarities(q: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.block_means`."""
    return block_means(q, *_of_queries(grid), None, grid.num_query_blocks, grid.block_size, True, True)


def _of_keys(grid: BlockGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the first key block's first slot in each row, and of its first real token, `[B]` each."""
    return grid.row_starts, grid.row_starts


def _of_queries(grid: BlockGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for query blocks, whose first slots may lie before the call."""
    shift = grid.row_starts - grid.q_start
    return shift + grid.query_block_ids[:, 0] * grid.block_size, shift.clamp(min=0)


def _outputs(
    x: torch.Tensor, blocks: int, with_means: bool, with_similarities: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    means = x.new_empty((*x.shape[:2], blocks, x.shape[-1]) if with_means else (0,), dtype=torch.float32)
    return means, x.new_empty((*x.shape[:2], blocks) if with_similarities else (0,), dtype=torch.float32)


@launch_op("block_means", _outputs)
def block_means(
    x: torch.Tensor,
    first: torch.Tensor,
    low: torch.Tensor,
    center: torch.Tensor | None,
    blocks: int,
    block_size: int,
    with_means: bool,
    with_similarities: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's launch, for the blocks of `x` `[B, H, S, D]` from index `first[b]` and the tokens from `low[b]` on.

    Returns:
        Means, float32 `[B, H, blocks, D]`, and similarities, `[B, H, blocks]`; results that are not wanted are empty.
    """
    batch, heads, length, head_dim = x.shape
    means, similarities = _outputs(x, blocks, with_means, with_similarities)
    _block_kernel[(batch * heads * blocks,)](
        x,
        first.contiguous(),
        low.contiguous(),
        means,
        similarities,
        by_row(center, x),
        *x.stride(),
        heads,
        blocks,
        length,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK=block_size,
        MEANS=with_means,
        SIMILARITIES=with_similarities,
        CENTERED=center is not None,
        num_warps=8 if with_similarities else 4,  # a block stays in registers until its similarity is known
    )
    return means, similarities


@jit(["blocks", "length"])
def _block_kernel(
    x, first, low, means, similarities, center, stride_xb, stride_xh, stride_xs, stride_xd, heads, blocks, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    MEANS: tl.constexpr, SIMILARITIES: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_block, i_bh = pid % blocks, pid // blocks
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)  # [BD]
    offs_s = tl.load(first + i_b) + i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    real = (offs_s >= tl.load(low + i_b)) & (offs_s < length)  # [BLOCK]
    mask = real[:, None] & (offs_d < D)[None, :]  # [BLOCK, BD]
    # [BLOCK, BD]
    p_x = x + i_b * stride_xb + i_h * stride_xh + offs_s[:, None] * stride_xs + offs_d.to(tl.int64)[None, :] * stride_xd
    b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)  # [BLOCK, BD]
    count = tl.maximum(tl.sum(real.to(tl.int32), 0), 1)
    if MEANS:
        tl.store(means + pid.to(tl.int64) * D + offs_d, tl.sum(b_x, 0) / count, mask=offs_d < D)
    if SIMILARITIES:
        if CENTERED:
            b_center = tl.load(center + i_bh.to(tl.int64) * D + offs_d, mask=offs_d < D, other=0.0)  # [BD]
            b_x = tl.where(mask, b_x - b_center[None, :], 0.0)  # [BLOCK, BD]
        length_x = tl.sqrt(tl.sum(b_x * b_x, 1))  # [BLOCK]
        total = tl.sum(b_x / tl.maximum(length_x, 1e-12)[:, None], 0)  # [BD]
        tl.store(similarities + pid, tl.sum(total * total, 0) / (count * count).to(tl.float32))
