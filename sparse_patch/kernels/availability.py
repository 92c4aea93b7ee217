"""Which devices the Triton kernels run on."""

from functools import cache
from importlib.util import find_spec

import torch

_HAS_TRITON = find_spec("triton") is not None


def why_no_triton(x: torch.Tensor) -> str | None:
    """Why no Triton kernel can run on a tensor; None if one can. Triton's interpreter runs on any device."""
    if not _HAS_TRITON:
        return "backend triton needs the package triton"
    if x.is_cuda:
        recent = _is_recent if torch.compiler.is_compiling() else _is_recent_once  # torch.compile traces no cache
        return None if recent(x.device) else "backend triton needs a GPU of compute capability 8.0 or more"
    return None if _interprets() else "backend triton needs a CUDA device"


def prefers_triton(x: torch.Tensor) -> bool:
    """Whether "auto" prefers an op's Triton kernel for a tensor: yes on every GPU that the kernel runs on."""
    return x.is_cuda and why_no_triton(x) is None


def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_properties(device).major >= 8


_is_recent_once = cache(_is_recent)  # PyTorch takes 10 us to answer


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _interprets() -> bool:
    """Whether Triton's interpreter is on. torch.compile cannot trace this check."""
    import triton

    return bool(triton.knobs.runtime.interpret)
