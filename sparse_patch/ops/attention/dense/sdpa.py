"""PyTorch's `scaled_dot_product_attention`, with one of its backends or with its own choice."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.alignment import MISALIGNED, STEP, is_aligned

# Each backend, and PyTorch's own check whether it serves a call. None: SDPA picks one, and always finds one.
BACKENDS: dict[str, tuple[SDPBackend, Callable[..., bool]] | None] = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, can_use_cudnn_attention),
    "flash2": (SDPBackend.FLASH_ATTENTION, can_use_flash_attention),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, can_use_efficient_attention),
    "sdpa": None,
}


def why_unsupported(call: AttentionCall, kernel: str) -> str | None:
    """Why this kernel cannot serve the call; None if it can. The caller checks padding and softcap first."""
    if call.q_start > 0:
        return f"kernel {kernel}: a chunk that follows on others"  # `is_causal` aligns the triangle at the top left
    backend = BACKENDS[kernel]
    if not call.q.is_cuda:
        return None if backend is None else f"kernel {kernel} needs a CUDA device"
    if torch.compiler.is_compiling():
        return f"kernel {kernel}: torch.compile cannot trace the question whether it serves"
    if not all(_is_read_right(x) for x in (call.q, call.k, call.v)):
        return f"kernel {kernel}: {MISALIGNED}"
    if backend is None:
        return None
    # Checked for every call: PyTorch knows its own limits, which depend on its version, cuDNN's version and the GPU.
    parameters = SDPAParams(call.q, call.k, call.v, None, 0.0, True, call.group_size > 1)
    with _only(kernel):
        if not backend[1](parameters):
            dims = f"head_dim {call.q.shape[-1]} and {call.v.shape[-1]}"
            return f"kernel {kernel}: PyTorch does not run it for {call.q.dtype}, {dims} on this GPU"
    return None


def _is_read_right(x: torch.Tensor) -> bool:
    """Whether the kernels read a tensor correctly as it is.

    PyTorch (2.11) does not check this: if rows begin elsewhere, cuDNN returns wrong numbers, and FlashAttention-2 makes
    CUDA unusable in the process. PyTorch itself copies rows whose size is not a multiple of 16 bytes, if it runs the
    kernel on them.
    """
    return x.shape[-1] * x.element_size() % STEP != 0 or is_aligned(x)


def attend(call: AttentionCall, kernel: str) -> torch.Tensor:
    """See `ops.attention.dense.attend`."""
    with _only(kernel):
        return torch.nn.functional.scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=True, scale=call.scale, enable_gqa=call.group_size > 1
        )


@contextmanager
def _only(kernel: str) -> Iterator[None]:
    """Let SDPA use only this backend."""
    backend = BACKENDS[kernel]
    if backend is None:
        yield
        return
    with sdpa_kernel(backend[0]):
        yield
