"""Where a tensor lies in memory, for kernels that read 16 bytes at a time: the copy engine's and libraries'."""

import torch

STEP = 16  # bytes
MISALIGNED = "queries, keys or values that do not lie in rows of 16-byte steps"


def is_aligned(x: torch.Tensor) -> bool:
    """Whether the rows of a tensor are in one piece and all begin at a multiple of 16 bytes. Nothing asks the GPU."""
    steps = STEP // x.element_size()
    return x.stride(-1) == 1 and all(stride % steps == 0 for stride in x.stride()[:-1]) and x.data_ptr() % STEP == 0
