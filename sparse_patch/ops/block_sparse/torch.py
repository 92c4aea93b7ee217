"""PyTorch backend: gathers the planned key blocks and computes nothing else, so it saves time on a CPU too.

A task is one query block of one head: gather its key blocks, multiply, softmax, multiply. On a CPU every core works
through tasks of its own with single-threaded operators: the scores stay in that core's cache, and there is no barrier
of all cores after each small operator, which costs more than the arithmetic when another process is running.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.layout import key_blocks, merge_query_blocks, query_blocks
from sparse_patch.plans import BlockPlan

Task = tuple[int, int, int]  # row of the batch, query head, query block


@dataclass(frozen=True)
class _Work:
    """A call cut into tasks, in float32, and the output that the tasks fill in."""

    q: torch.Tensor  # [B, Hq, NQ, block, D]
    k: torch.Tensor  # [B * Hkv * N, block, D]
    v: torch.Tensor  # [B * Hkv * N, block, Dv]
    scale: float
    softcap: float | None
    lists: torch.Tensor  # int64 [B, Hq, NQ, N], indices into k and v
    counts: list[list[list[int]]]  # entries of each list that count
    ends_on_diagonal: list[list[list[bool]]]  # whether the last of them is the diagonal block
    above_diagonal: torch.Tensor  # bool [block, block]
    out: torch.Tensor  # [B, Hq, NQ, block, Dv], laid out in memory as [B, Sq, Hq, Dv], which Transformers wants
    lse: torch.Tensor | None  # [B, Hq, NQ, block]


class _Buffers(dict[str, torch.Tensor]):
    """Memory that the tasks of one worker share: fresh pages cost as much as the softmax."""

    def get_like(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        if name not in self or self[name].numel() < size:
            self[name] = like.new_empty(size)
        return self[name][:size].view(shape)


def attend_torch(
    call: AttentionCall, plan: BlockPlan, return_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `ops.block_sparse.attend`. Reads the counts on the host: meant for the CPU, correct anywhere."""
    work = _cut(call, plan, return_lse)
    _run(work, iter(_longest_first(work.counts)))
    out = merge_query_blocks(work.out, plan.grid).to(call.q.dtype)
    return out, None if work.lse is None else merge_query_blocks(work.lse, plan.grid, -torch.inf)


def _cut(call: AttentionCall, plan: BlockPlan, return_lse: bool) -> _Work:
    batch, heads, rows = plan.counts.shape
    block = plan.grid.block_size
    v = key_blocks(call.v, plan.grid).float().flatten(0, 2)
    last = plan.indices.gather(-1, (plan.counts.long() - 1).clamp(min=0)[..., None]).squeeze(-1)
    return _Work(
        q=query_blocks(call.q, plan.grid).float(),
        k=key_blocks(call.k, plan.grid).float().flatten(0, 2),
        v=v,
        scale=call.scale,
        softcap=call.softcap,
        lists=_flat_lists(call, plan),
        counts=plan.counts.tolist(),
        ends_on_diagonal=(last == plan.grid.query_block_ids[:, None]).tolist(),
        above_diagonal=torch.ones(block, block, dtype=torch.bool, device=v.device).triu(1),
        out=v.new_zeros(batch, rows, block, heads, v.shape[-1]).permute(0, 3, 1, 2, 4),
        lse=v.new_full((batch, heads, rows, block), -torch.inf) if return_lse else None,
    )


def _flat_lists(call: AttentionCall, plan: BlockPlan) -> torch.Tensor:
    """The lists as indices into the flat key blocks, int64 `[B, Hq, NQ, N]`."""
    batch, kv_heads = call.k.shape[:2]
    kv_head = torch.arange(batch * kv_heads, device=call.k.device).view(batch, kv_heads, 1)
    first = kv_head.expand(-1, -1, call.group_size).reshape(batch, -1, 1, 1) * plan.grid.num_key_blocks
    return plan.indices + first


def _longest_first(counts: list[list[list[int]]]) -> list[Task]:
    """The tasks that have a list, so that the workers finish together."""
    tasks = [
        (count, (row, head, block))
        for row, heads in enumerate(counts)
        for head, blocks in enumerate(heads)
        for block, count in enumerate(blocks)
        if count
    ]
    return [task for _, task in sorted(tasks, reverse=True)]


def _run(work: _Work, tasks: Iterator[Task]) -> None:
    """Work through the tasks: in one thread per core on a CPU, in this one elsewhere."""
    threads = torch.get_num_threads() if work.q.device.type == "cpu" else 1
    mode = torch.is_inference_mode_enabled()
    if threads == 1:
        return _run_tasks(work, tasks, mode)
    try:
        with ThreadPoolExecutor(threads, initializer=_set_up_worker) as pool:
            for worker in [pool.submit(_run_tasks, work, tasks, mode) for _ in range(threads)]:
                worker.result()
    finally:
        torch.set_num_threads(threads)  # the default of new threads, which the workers changed


def _set_up_worker() -> None:
    """Settings of this thread alone: single-threaded operators, and weights below 1e-38 are 0 (they are slow)."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def _run_tasks(work: _Work, tasks: Iterator[Task], inference_mode: bool) -> None:
    """One worker: takes tasks until none is left."""
    buffers = _Buffers()
    with torch.inference_mode(inference_mode), torch.no_grad():
        for task in tasks:
            _attend_task(work, task, buffers)


def _attend_task(work: _Work, task: Task, buffers: _Buffers) -> None:
    """Attend one query block of one head; the lists are ascending, so the diagonal block stands last."""
    row, head, query_block = task
    q, count = work.q[task], work.counts[row][head][query_block]
    block, keys = len(q), count * len(q)
    index = work.lists[task][:count]
    k = buffers.get_like("k", work.k, count, block, work.k.shape[-1])
    v = buffers.get_like("v", work.v, count, block, work.v.shape[-1])
    torch.index_select(work.k, 0, index, out=k)
    torch.index_select(work.v, 0, index, out=v)
    scores = buffers.get_like("scores", q, block, keys)
    torch.addmm(scores, q, k.view(keys, -1).t(), beta=0, alpha=work.scale, out=scores)
    apply_softcap(scores, work.softcap)
    if work.ends_on_diagonal[row][head][query_block]:
        scores[:, -block:].masked_fill_(work.above_diagonal, -torch.inf)
    if work.lse is not None:
        torch.logsumexp(scores, -1, out=work.lse[task])
    weights = buffers.get_like("weights", q, block, keys)
    torch.softmax(scores, -1, out=weights)
    torch.mm(weights, v.view(keys, -1), out=work.out[task])
