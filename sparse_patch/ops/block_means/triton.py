"""Triton kernel of the means: one program reads one block where it lies, whatever its strides and its row's padding."""

import torch
import triton
import triton.language as tl

from sparse_patch.plans import BlockGrid


def key_means(k: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """See `ops.block_means`."""
    means = k.new_empty(*k.shape[:2], grid.num_key_blocks, k.shape[-1], dtype=torch.float32)
    _launch(k, grid, *_of_keys(grid), means=means)
    return means


def key_similarities(k: torch.Tensor, grid: BlockGrid, center: torch.Tensor) -> torch.Tensor:
    """See `ops.block_means`."""
    similarities = k.new_empty(*k.shape[:2], grid.num_key_blocks, dtype=torch.float32)
    _launch(k, grid, *_of_keys(grid), similarities=similarities, center=center.contiguous())
    return similarities


def query_means(q: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """See `ops.block_means`."""
    means = q.new_empty(*q.shape[:2], grid.num_query_blocks, q.shape[-1], dtype=torch.float32)
    _launch(q, grid, *_of_queries(grid), means=means)
    return means


def query_means_and_similarities(q: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.block_means`."""
    means = q.new_empty(*q.shape[:2], grid.num_query_blocks, q.shape[-1], dtype=torch.float32)
    similarities = torch.empty_like(means[..., 0], memory_format=torch.contiguous_format)
    _launch(q, grid, *_of_queries(grid), means=means, similarities=similarities)
    return means, similarities


def _of_keys(grid: BlockGrid) -> tuple[int, torch.Tensor, torch.Tensor]:
    """Number of key blocks; index of the first one's first slot in each row, and of its first real token, `[B]`."""
    first = grid.row_starts.contiguous()
    return grid.num_key_blocks, first, first


def _of_queries(grid: BlockGrid) -> tuple[int, torch.Tensor, torch.Tensor]:
    """The same of query blocks, whose first slots may lie before the call."""
    shift = grid.row_starts - grid.q_start
    return grid.num_query_blocks, shift + grid.query_block_ids[:, 0] * grid.block_size, shift.clamp(min=0)


def _launch(
    x: torch.Tensor,
    grid: BlockGrid,
    blocks: int,
    first: torch.Tensor,
    low: torch.Tensor,
    means: torch.Tensor | None = None,
    similarities: torch.Tensor | None = None,
    center: torch.Tensor | None = None,
) -> None:
    """Fill what is wanted, of the blocks of `x` `[B, H, S, D]` from index `first[b]` on, of tokens from `low[b]` on."""
    batch, heads, length, head_dim = x.shape
    _block_kernel[(batch * heads * blocks,)](
        x,
        first,
        low,
        x if means is None else means,
        x if similarities is None else similarities,
        x if center is None else center,
        *x.stride(),
        heads,
        blocks,
        length,
        D=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK=grid.block_size,
        MEANS=means is not None,
        SIMILARITIES=similarities is not None,
        CENTERED=center is not None,
        num_warps=4 if similarities is None else 8,  # a block stays in registers until its similarity is known
    )


@triton.jit(do_not_specialize=["blocks", "length"])
def _block_kernel(
    x, first, low, means, similarities, center, stride_xb, stride_xh, stride_xs, stride_xd, heads, blocks, length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    MEANS: tl.constexpr, SIMILARITIES: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i_block, i_bh = pid % blocks, pid // blocks
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_s = tl.load(first + i_b) + i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = (offs_s >= tl.load(low + i_b)) & (offs_s < length)
    mask = real[:, None] & (offs_d < D)[None, :]
    p_x = x + i_b * stride_xb + i_h * stride_xh + offs_s[:, None] * stride_xs + offs_d.to(tl.int64)[None, :] * stride_xd
    b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    count = tl.maximum(tl.sum(real.to(tl.int32), 0), 1)
    if MEANS:
        tl.store(means + pid.to(tl.int64) * D + offs_d, tl.sum(b_x, 0) / count, mask=offs_d < D)
    if SIMILARITIES:
        if CENTERED:
            b_center = tl.load(center + i_bh.to(tl.int64) * D + offs_d, mask=offs_d < D, other=0.0)
            b_x = tl.where(mask, b_x - b_center[None, :], 0.0)
        length_x = tl.sqrt(tl.sum(b_x * b_x, 1))
        total = tl.sum(b_x / tl.maximum(length_x, 1e-12)[:, None], 0)
        tl.store(similarities + pid, tl.sum(total * total, 0) / (count * count).to(tl.float32))
