"""Triton kernel of the means: one program reads one block where it lies, whatever its strides and its row's padding."""

import torch
import triton
import triton.language as tl

from sparse_patch.plans import BlockGrid


def key_means(k: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """See `ops.block_means`."""
    starts = grid.row_starts
    return _means(k, grid, grid.num_key_blocks, starts, starts)


def query_means(q: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """See `ops.block_means`."""
    shift = grid.row_starts - grid.q_start
    first = shift + grid.query_block_ids[:, 0] * grid.block_size
    return _means(q, grid, grid.num_query_blocks, first, shift.clamp(min=0))


def _means(x: torch.Tensor, grid: BlockGrid, blocks: int, first: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Means of the blocks of `x` `[B, H, S, D]` that begin at index `first[b]`, over indices from `low[b]` on."""
    batch, heads, length, head_dim = x.shape
    means = x.new_empty(batch, heads, blocks, head_dim, dtype=torch.float32)
    block_d = triton.next_power_of_2(head_dim)
    _mean_kernel[(batch * heads * blocks,)](
        x,
        first,
        low,
        means,
        *x.stride()[:3],
        heads,
        blocks,
        length,
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK=grid.block_size,
    )
    return means


@triton.jit(do_not_specialize=["blocks", "length"])
def _mean_kernel(
    x, first, low, means, stride_xb, stride_xh, stride_xs, heads, blocks, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_block, i_bh = pid % blocks, pid // blocks
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.load(first + i_b) + i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = (offs_s >= tl.load(low + i_b)) & (offs_s < length)
    p_x = x + i_b * stride_xb + i_h * stride_xh + offs_s[:, None] * stride_xs + offs_d[None, :]
    b_x = tl.load(p_x, mask=real[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)
    count = tl.maximum(tl.sum(real.to(tl.int32), 0), 1)
    tl.store(means + pid.to(tl.int64) * D + offs_d, tl.sum(b_x, 0) / count, mask=offs_d < D)
