"""Random plans, with rows that read nothing among them."""

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.plans import BlockGrid, BlockPlan, PagePlan, TokenBlockPlan


def random_blocks(
    call: AttentionCall, block_size: int, density: float, seed: int = 0, columns: int | None = None
) -> BlockPlan:
    """Random blocks; some rows get none, some no diagonal, some all. As many random columns per head, if any."""
    grid = BlockGrid.of(call, block_size)
    batch, heads = call.q.shape[:2]
    shape = (batch, heads, grid.num_query_blocks, grid.num_key_blocks)
    generator = torch.Generator(call.q.device).manual_seed(seed)
    blocks = torch.rand(shape, generator=generator, device=call.q.device) < density
    if columns is None:
        return BlockPlan.from_blocks(blocks, grid)
    keys = torch.rand(batch, heads, call.kv_length, generator=generator, device=call.q.device).argsort(-1)[
        ..., :columns
    ]
    keys[..., -1] = -1  # none
    return BlockPlan.from_blocks(blocks, grid, keys)


def random_token_blocks(
    call: AttentionCall, tile: int = 4, init: int = 1, local: int = 1, dense: int = 0, chance: float = 0.4
) -> TokenBlockPlan:
    """Blocks that are drawn for every token between those that it always reads."""
    grid = BlockGrid.of(call, 64)
    block = grid.query_block_ids
    low = (block - local).clamp(min=0).masked_fill(block < dense, 0)
    number = torch.arange(grid.num_key_blocks, device=call.q.device)
    between = (number >= low.clamp(max=init)[..., None]) & (number < low[..., None])
    generator = torch.Generator().manual_seed(1)
    shape = len(call.q), call.k.shape[1], grid.num_query_blocks, 64, grid.num_key_blocks
    drawn = (torch.rand(shape, generator=generator) < chance).to(call.q.device) & between[:, None, :, None]
    lists = TokenBlockPlan.packed(drawn, grid.query_is_real, tile)
    return TokenBlockPlan(*lists, grid, tile, call.q.shape[1], init, local, dense)


def random_pages(call: AttentionCall, lists: int, page_size: int, most: int = 10**9, seed: int = 0) -> PagePlan:
    """Random numbers of random pages in random order, at most `most`; what follows them is out of every range."""
    generator = torch.Generator().manual_seed(seed)
    batch, pages = call.q.shape[0], -(-call.kv_length // page_size)
    size = min(most, pages)
    available = (-(-call.lengths().cpu() // page_size)).clamp(max=size)
    counts = (torch.rand(batch, lists, generator=generator) * (available[:, None] + 1)).int()
    order = torch.rand(batch, lists, pages, generator=generator)
    order[torch.arange(pages) * page_size >= call.lengths().cpu()[:, None, None].expand_as(order)] = 2.0
    listed = order.argsort(-1)[..., :size].int()
    listed[torch.arange(size) >= counts[..., None]] = 2**31 - 1
    device = call.q.device
    return PagePlan.of(call, listed.to(device), counts.to(device), page_size)
