"""Triton kernel of `compact`: one program per row."""

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import launch_op


def _outputs(marked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lists = torch.empty(marked.shape, dtype=torch.int32, device=marked.device)
    return lists, torch.empty(marked.shape[:-1], dtype=torch.int32, device=marked.device)


@launch_op("compact", _outputs)
def compact(marked: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.compaction.compact`."""
    lists, counts = _outputs(marked)
    length = marked.shape[-1]
    block = min(1024, triton.next_power_of_2(max(length, 1)))
    _compact_kernel[(counts.numel(),)](
        marked.contiguous(), values, lists, counts, *marked.shape[1:3], length, *values.stride(), BLOCK=block
    )
    return lists, counts


@jit(["length"])
def _compact_kernel(
    marked, values, lists, counts, heads, queries, length, stride_b, stride_h, stride_q, stride_n, BLOCK: tl.constexpr
):
    pid = tl.program_id(0).to(tl.int64)
    i_q, i_h, i_b = pid % queries, pid // queries % heads, pid // queries // heads
    p_values = values + i_b * stride_b + i_h * stride_h + i_q * stride_q
    count = 0
    for i in tl.range(0, length, BLOCK):
        offs = i + tl.arange(0, BLOCK)  # [BLOCK]
        taken = (tl.load(marked + pid * length + offs, mask=offs < length, other=0) != 0).to(tl.int32)  # [BLOCK]
        value = tl.load(p_values + offs.to(tl.int64) * stride_n, mask=offs < length, other=0)  # [BLOCK]
        tl.store(lists + pid * length + count + tl.cumsum(taken, 0) - 1, value, mask=taken != 0)
        count += tl.sum(taken, 0)
    tl.store(counts + pid, count)
