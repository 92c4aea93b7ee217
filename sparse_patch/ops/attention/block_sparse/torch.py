"""PyTorch backend: gathers the planned keys and computes nothing else, so it saves time on a CPU too.

A task is one query block of one head: gather its key blocks and columns, multiply, softmax, multiply. On a CPU every
core has its own tasks and runs them with single-threaded operators. The scores stay in that core's cache, and no
barrier of all cores follows each small operator; such a barrier costs more than the arithmetic if another process runs.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.attention.block_sparse.tiles import tile_side
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.layout import key_blocks, merge_query_blocks, query_blocks
from sparse_patch.plans import BlockPlan, leading


@dataclass(frozen=True)
class _Task:
    """One query block of one head: views of its inputs and of its outputs."""

    q: torch.Tensor  # [block, D]
    blocks: torch.Tensor  # int32 [count], indices into the work's key blocks, ascending
    columns: torch.Tensor  # int32 [columns], indices into the work's keys
    on_diagonal: bool  # whether the last block is the diagonal block
    out: torch.Tensor  # [block, Dv]
    lse: torch.Tensor | None  # [block]
    real: torch.Tensor | None  # bool [block], the real queries; only if tiles may be left out

    @property
    def keys(self) -> int:
        return len(self.blocks) * len(self.q) + len(self.columns)


@dataclass(frozen=True)
class _Work:
    """What all tasks of a call share, in float32."""

    k: torch.Tensor  # [B * Hkv * N, block * D]
    v: torch.Tensor  # [B * Hkv * N, block * Dv]
    above_diagonal: torch.Tensor  # bool [block, block]
    scale: float
    softcap: float | None
    pv_threshold: float | None


class _Buffers:
    """Memory that the tasks of one worker share, because fresh pages cost as much as the softmax."""

    def __init__(self, work: _Work, most_keys: int) -> None:
        block = len(work.above_diagonal)
        self.k = work.k.new_empty(most_keys, work.k.shape[1] // block)
        self.v = work.v.new_empty(most_keys, work.v.shape[1] // block)
        self.scores = work.k.new_empty(most_keys * block)
        self.weights = torch.empty_like(self.scores)


def attend(call: AttentionCall, plan: BlockPlan, return_lse: bool = False) -> Attended:
    """See `ops.attention.block_sparse.attend`. Reads the plan on the host: meant for the CPU, correct on any device."""
    grid, (batch, heads, rows) = plan.grid, plan.counts.shape
    work = _Work(
        k=key_blocks(call.k, grid).float().flatten(0, 2).flatten(1),
        v=key_blocks(call.v, grid).float().flatten(0, 2).flatten(1),
        above_diagonal=call.q.new_ones(grid.block_size, grid.block_size, dtype=torch.bool).triu(1),
        scale=call.scale,
        softcap=call.softcap,
        pv_threshold=plan.pv_threshold,
    )
    # Laid out in memory as [B, Sq, Hq, Dv], which Transformers expects.
    out = work.v.new_zeros(batch, rows, grid.block_size, heads, call.v.shape[-1]).permute(0, 3, 1, 2, 4)
    lse = work.k.new_full((batch, heads, rows, grid.block_size), -torch.inf) if return_lse else None
    _run(work, _tasks(call, plan, query_blocks(call.q, grid).float(), out, lse))
    merged_lse = None if lse is None else merge_query_blocks(lse, grid, -torch.inf)
    return Attended(merge_query_blocks(out, grid).to(call.q.dtype), merged_lse)


def _tasks(
    call: AttentionCall, plan: BlockPlan, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
) -> list[_Task]:
    """The tasks that have any key, longest first, so that the workers finish together."""
    counts: list[int] = plan.counts.flatten().tolist()
    first_block = _first_key_block(call, plan)
    lists = (plan.indices + first_block)[plan.listed].split(counts)
    columns = _columns(plan, first_block * plan.grid.block_size)
    on_diagonal = plan.on_diagonal.flatten().tolist()
    lses = [None] * len(counts) if lse is None else _each(lse)
    real = [None] * len(counts) if plan.pv_threshold is None else _each(_real_queries(plan))
    tasks = [
        _Task(*fields)
        for fields in zip(_each(q), lists, columns, on_diagonal, _each(out), lses, real, strict=True)
        if len(fields[1]) + len(fields[2])
    ]
    return sorted(tasks, key=lambda task: -task.keys)


def _columns(plan: BlockPlan, first_key: torch.Tensor) -> Sequence[torch.Tensor]:
    """The columns of each query block of each head, as indices into the work's keys."""
    if plan.columns is None or plan.column_counts is None:
        return [plan.indices.new_empty(0)] * plan.counts.numel()
    listed = leading(plan.columns, plan.column_counts)
    return (plan.columns + first_key)[listed].split(plan.column_counts.flatten().tolist())


def _each(x: torch.Tensor) -> list[torch.Tensor]:
    """All `x[b, h, i]` as views, in order."""
    return [block for row in x.unbind() for head in row.unbind() for block in head.unbind()]


def _real_queries(plan: BlockPlan) -> torch.Tensor:
    """Which slots of the query blocks hold a real query, bool `[B, Hq, NQ, block]`."""
    return plan.grid.query_is_real[:, None].expand(-1, plan.counts.shape[1], -1, -1)


def _first_key_block(call: AttentionCall, plan: BlockPlan) -> torch.Tensor:
    """Where the key blocks of each query head's KV head begin in `_Work.k`, int32 `[B, Hq, 1, 1]`."""
    batch, kv_heads = call.k.shape[:2]
    kv_head = torch.arange(batch * kv_heads, dtype=torch.int32, device=call.k.device).view(batch, kv_heads)
    return kv_head.repeat_interleave(call.group_size, 1)[..., None, None] * plan.grid.num_key_blocks


def _run(work: _Work, tasks: list[_Task]) -> None:
    """Run all tasks: in one thread per core on a CPU, in this thread on other devices."""
    if not tasks:
        return
    threads = torch.get_num_threads() if work.k.device.type == "cpu" else 1
    arguments = work, iter(tasks), tasks[0].keys, torch.is_inference_mode_enabled()
    if threads == 1:
        return _run_tasks(*arguments)
    try:
        with ThreadPoolExecutor(threads, initializer=_set_up_worker) as pool:
            for worker in [pool.submit(_run_tasks, *arguments) for _ in range(threads)]:
                worker.result()
    finally:
        torch.set_num_threads(threads)  # the default of new threads, which the workers changed


def _set_up_worker() -> None:
    """Settings of this thread only: single-threaded operators, and weights below 1e-38 are 0 (they are slow)."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _run_tasks(work: _Work, tasks: Iterator[_Task], most_keys: int, inference_mode: bool) -> None:
    """Run tasks, as one worker, until none is left."""
    with torch.inference_mode(inference_mode), torch.no_grad():
        buffers = _Buffers(work, most_keys)
        for task in tasks:
            _attend_task(work, task, buffers)


def _attend_task(work: _Work, task: _Task, buffers: _Buffers) -> None:
    """Attend one task. Each operator here runs thousands of times per call, so there are as few as possible."""
    block, in_blocks, keys = len(task.q), len(task.blocks) * len(task.q), task.keys
    torch.index_select(work.k, 0, task.blocks, out=buffers.k[:in_blocks].view(-1, work.k.shape[1]))
    torch.index_select(work.v, 0, task.blocks, out=buffers.v[:in_blocks].view(-1, work.v.shape[1]))
    if keys > in_blocks:
        head_dim, value_dim = buffers.k.shape[1], buffers.v.shape[1]
        torch.index_select(work.k.view(-1, head_dim), 0, task.columns, out=buffers.k[in_blocks:keys])
        torch.index_select(work.v.view(-1, value_dim), 0, task.columns, out=buffers.v[in_blocks:keys])
    scores = buffers.scores[: block * keys].view(block, keys)
    torch.addmm(scores, task.q, buffers.k[:keys].t(), beta=0, alpha=work.scale, out=scores)
    apply_softcap(scores, work.softcap)
    if task.on_diagonal:
        scores[:, in_blocks - block : in_blocks].masked_fill_(work.above_diagonal, -torch.inf)
    if work.pv_threshold is not None and task.real is not None:
        _leave_out(scores, task.real, task.on_diagonal, work.pv_threshold)
    if task.lse is not None:
        torch.logsumexp(scores, -1, out=task.lse)
    weights = buffers.weights[: block * keys].view(block, keys)
    torch.softmax(scores, -1, out=weights)
    torch.mm(weights, buffers.v[:keys], out=task.out)


def _leave_out(scores: torch.Tensor, real: torch.Tensor, on_diagonal: bool, threshold: float) -> None:
    """Set scores to `-inf` in tiles that lie `threshold`, in log2 units, below what was read before them."""
    block, side = len(real), tile_side(len(real))
    tiles = scores.view(block // side, side, -1, side)
    of_tiles = tiles.amax(-1)  # [query tiles, queries, key tiles]
    before = of_tiles.cummax(-1).values[..., :-1]  # a tile that is left out never has the maximum
    above = (of_tiles[..., 1:] - before).masked_fill(~real.view(-1, side, 1), -torch.inf).amax(1)
    far = above + threshold * math.log(2) <= 0  # of the tiles from the second on
    if on_diagonal:
        far.diagonal(far.shape[-1] - block // side).fill_(False)  # tiles after the last one are in the future
    elif far.shape[-1]:
        far[:, -1] = False
    tiles[:, :, 1:].masked_fill_(far[:, None, :, None], -torch.inf)
