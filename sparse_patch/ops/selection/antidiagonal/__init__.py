"""Block masses estimated from antidiagonals: the scores of XAttention.

The tokens of a row are cut into groups of `stride`. The logit of query group `a` and key group `c <= a` is the mean
over the antidiagonal of their tile: query `stride - 1 - t` of `a` with key `t` of `c`, for `t` from 0 to `stride - 1`.
A softmax over `c` gives the attention of each query group, and the mass of a block is its sum over the key groups of
the block, averaged over the query groups of the block. Every row of the batch has its groups on its own `BlockGrid`.

- The mean is over the real queries of the group: at a row's end, and if a chunk begins inside a group, there are fewer
  than `stride`. A group without a real query does not count in the mean of its block.
- The row's last key group may be short too. Its missing keys are zeros; only the last query group sees it.
- The tile `a == c` counts as a whole, including future keys. It lies in the diagonal block.
- The softcap, if there is one, is applied to the mean logit, which has the size of a logit.

With `stride` 1 the masses are those of dense attention.

Backends: `torch` (one matrix product per slice of query groups; float32 on a CPU, the input's dtype elsewhere) and
`triton` (one kernel). Both serve float16, bfloat16 or float32, softmax and sums in float32, grouped KV heads without
repeating them, any scale, softcap, left padding per row, `q_start > 0`, any length and strides.
"""

from collections.abc import Iterator

from torch import Tensor

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.kernels.availability import why_no_triton
from sparse_patch.ops.backends import fastest
from sparse_patch.ops.selection.antidiagonal.torch import block_masses as in_torch
from sparse_patch.plans import BlockGrid


def block_masses(
    call: AttentionCall, grid: BlockGrid, stride: int, backend: str = "auto"
) -> Iterator[tuple[slice, Tensor]]:
    """Mass of every block of the call, one slice of the query blocks at a time.

    Args:
        call: the attention call.
        grid: the call's grid of blocks.
        stride: tokens of a group; divides the block size.
        backend: "torch", "triton", or "auto" for the fastest one that serves the call.

    Yields:
        Which query blocks, and their masses, float32 `[B, Hq, NQ of the slice, N of the slice]`: the sum is 1, or 0 for
        query blocks that a row does not have. Key blocks after the last one that the slice can see are cut off.

    Raises:
        UnsupportedCallError: the backend cannot serve the call.
    """
    if backend == "triton" and (reason := why_no_triton(call.q)):
        raise UnsupportedCallError(reason)
    if backend == "triton" or (backend == "auto" and fastest(call) == "triton"):
        from sparse_patch.ops.selection.antidiagonal.triton import block_masses as in_triton

        return in_triton(call, grid, stride)
    return in_torch(call, grid, stride)
