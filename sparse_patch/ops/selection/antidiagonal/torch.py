"""PyTorch backend: the antidiagonal logits of a slice of query groups are one matrix product of depth stride * D."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.kernels.slices import slices
from sparse_patch.ops.layout import key_blocks, query_slots
from sparse_patch.plans import BlockGrid


@dataclass(frozen=True)
class _Groups:
    """A call cut into groups of `stride` tokens; GQ = NQ * groups_per_block, GK = N * groups_per_block."""

    call: AttentionCall
    grid: BlockGrid
    stride: int
    keys: torch.Tensor  # [B, Hkv, GK, stride * D]
    position: torch.Tensor  # int64 [B, GQ], the key group that begins where the query group does
    factor: torch.Tensor  # float32 [B, GQ], converts a query group's product, which is of means, to its logits
    weight: torch.Tensor  # float32 [B, GQ], share of a query group in its block; 0 for groups without a real query

    @classmethod
    def of(cls, call: AttentionCall, grid: BlockGrid, stride: int) -> "_Groups":
        keys = key_blocks(call.k, grid)
        keys = keys if keys.is_cuda else keys.float()
        per_block = grid.block_size // stride
        number = torch.arange(grid.num_query_blocks * per_block, device=keys.device)
        real_queries = grid.query_is_real.unflatten(-1, (per_block, stride)).sum(-1)  # [B, NQ, per_block]
        exists = (real_queries > 0).float()
        weight = exists / exists.sum(-1, keepdim=True).clamp(min=1)
        factor = call.scale * stride / real_queries.clamp(min=1).float()
        position = grid.query_block_ids[:, :1] * per_block + number
        return cls(
            call,
            grid,
            stride,
            keys.flatten(2, 3).unflatten(2, (-1, stride)).flatten(3),
            position,
            factor.flatten(1),
            weight.flatten(1),
        )

    @property
    def per_block(self) -> int:
        return self.grid.block_size // self.stride

    def bytes_each(self, visible: int) -> int:
        """Temporary bytes for each query group that sees `visible` key groups: logits, and three times its queries."""
        batch, heads, _, head_dim = self.call.q.shape
        size = self.keys.element_size()
        logits = visible * (4 if size == 4 else 4 + size)
        return batch * heads * (logits + 3 * size * self.stride * head_dim)


def block_masses(call: AttentionCall, grid: BlockGrid, stride: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """See `ops.selection.antidiagonal`. Besides the slices, keys are copied at most once, if they are not in order."""
    groups = _Groups.of(call, grid, stride)
    batch, heads = call.q.shape[:2]
    for blocks in slices(grid.num_query_blocks, 4 * batch * heads * grid.num_key_blocks):
        yield blocks, _masses(groups, blocks)


def _masses(groups: _Groups, blocks: slice) -> torch.Tensor:
    """The masses of a slice of the query blocks."""
    grid, per_block = groups.grid, groups.per_block
    number, visible = blocks.stop - blocks.start, grid.visible_key_blocks(blocks.stop)
    batch, heads = groups.call.q.shape[:2]
    masses = torch.zeros(batch, heads, number, visible, device=groups.keys.device)
    for part in slices(number * per_block, groups.bytes_each(visible * per_block), per_block):
        begin, end = part.start + blocks.start * per_block, part.stop + blocks.start * per_block
        rows = _attention_to_blocks(groups, begin, end, visible)
        summed = rows.unflatten(2, (-1, min(end - begin, per_block))).sum(3)
        masses[:, :, part.start // per_block :][:, :, : summed.shape[2]] += summed
    return masses


def _attention_to_blocks(groups: _Groups, begin: int, end: int, visible: int) -> torch.Tensor:
    """Weighted attention of the query groups `begin` to `end - 1` to the first key blocks: `[B, Hq, groups, N]`."""
    call, stride = groups.call, groups.stride
    keys = groups.keys[:, :, : visible * groups.per_block]
    q = query_slots(call.q, groups.grid, begin * stride, end * stride).to(keys.dtype) / stride
    q = q.unflatten(2, (-1, stride)).flip(3).flatten(3)  # [B, Hq, groups, stride * D]: the last query first
    q = q.unflatten(1, (-1, call.group_size)).flatten(2, 3)  # the heads of a KV head one after another
    logits = (q @ keys.transpose(-1, -2)).float().unflatten(2, (call.group_size, -1)).flatten(1, 2)
    logits = apply_softcap(logits.mul_(groups.factor[:, None, begin:end, None]), call.softcap)
    future = torch.arange(keys.shape[2], device=q.device) > groups.position[:, begin:end, None]
    logits.masked_fill_(future[:, None], -torch.inf)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    by_block = weights.unflatten(-1, (visible, -1)).sum(-1)
    return by_block * (groups.weight[:, None, begin:end] / by_block.sum(-1))[..., None]
