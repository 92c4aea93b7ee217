"""Memory alignment of tensors, for kernels that read 16 bytes at a time: the copy engine's and those of libraries."""

import torch

STEP = 16  # bytes
MISALIGNED = "queries, keys or values that do not lie in rows of 16-byte steps"


def is_aligned(x: torch.Tensor) -> bool:
    """Whether every row of a tensor is contiguous and begins at a multiple of 16 bytes; found without a host sync."""
    steps = STEP // x.element_size()
    return x.stride(-1) == 1 and all(stride % steps == 0 for stride in x.stride()[:-1]) and x.data_ptr() % STEP == 0
