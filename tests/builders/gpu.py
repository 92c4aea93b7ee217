"""Calls on a GPU, and a check that the host does not wait for it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparse_patch.call import AttentionCall


def on_gpu(call: AttentionCall) -> AttentionCall:
    return AttentionCall(
        **{key: value.cuda() if torch.is_tensor(value) else value for key, value in vars(call).items()}
    )


@contextmanager
def no_waits() -> Iterator[None]:
    """What makes the host wait for the GPU in here raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
