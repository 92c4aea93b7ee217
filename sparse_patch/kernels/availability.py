"""Where the Triton kernels run."""

from importlib.util import find_spec

import torch

_HAS_TRITON = find_spec("triton") is not None


def why_no_triton(x: torch.Tensor) -> str | None:
    """Why no Triton kernel can run on a tensor; None if one can, as on any device in Triton's interpreter."""
    if not _HAS_TRITON:
        return "backend triton needs the package triton"
    if x.is_cuda:
        recent = torch.cuda.get_device_properties(x.device).major >= 8  # torch.compile can trace it
        return None if recent else "backend triton needs a GPU of compute capability 8.0 or more"
    return None if _interprets() else "backend triton needs a CUDA device"


def prefers_triton(x: torch.Tensor) -> bool:
    """Whether an op that chooses for itself takes its Triton kernel for a tensor: on every GPU that it runs on."""
    return x.is_cuda and why_no_triton(x) is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _interprets() -> bool:
    """Whether Triton's interpreter is on; torch.compile cannot trace the question."""
    import triton

    return bool(triton.knobs.runtime.interpret)
