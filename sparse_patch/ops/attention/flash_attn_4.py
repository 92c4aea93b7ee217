"""The requirements of every kernel of the package flash-attn-4 (CuTe DSL)."""

from functools import cache
from importlib.util import find_spec

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.alignment import MISALIGNED, is_aligned

_HEAD_DIMS = (64, 96, 128)


def why_unsupported(call: AttentionCall, name: str) -> str | None:
    """Why the kernel or backend `name` cannot serve the call, as far as the package decides that; None if it can."""
    if not call.q.is_cuda or torch.cuda.get_device_capability(call.q.device)[0] != 9:
        return f"{name} needs a Hopper GPU"
    if not installed():
        return f"{name} needs the package flash-attn-4"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"{name}: dtype {call.q.dtype}"
    if call.q.shape[-1] not in _HEAD_DIMS or call.v.shape[-1] != call.q.shape[-1]:
        return f"{name}: head_dim {call.q.shape[-1]} and {call.v.shape[-1]}"
    if torch.compiler.is_compiling():
        return f"{name}: torch.compile cannot trace the package"
    if not all(is_aligned(x) for x in (call.q, call.k, call.v)):
        return f"{name}: {MISALIGNED}"
    return None


@cache
def installed() -> bool:
    """Whether the package flash-attn-4 is installed."""
    try:
        return find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False
