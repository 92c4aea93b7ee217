"""Where the Triton kernels of the ops run."""

from importlib.util import find_spec

import torch

from sparse_patch.call import AttentionCall

# What an op without a kernel of flash-attn-4 chooses for itself; a configuration may name flash for another op.
OWN_CHOICE = ("auto", "flash")
_HAS_TRITON = find_spec("triton") is not None


def triton_unsupported(x: torch.Tensor) -> str | None:
    """Why no Triton kernel can run on a tensor; None if one can, as on any device in Triton's interpreter."""
    if not _HAS_TRITON:
        return "backend triton needs the package triton"
    if x.is_cuda:
        recent = torch.cuda.get_device_properties(x.device).major >= 8  # torch.compile can trace it
        return None if recent else "backend triton needs a GPU of compute capability 8.0 or more"
    return None if _interprets() else "backend triton needs a CUDA device"


def kernel_unsupported(call: AttentionCall) -> str | None:
    """Why the Triton kernels of attention cannot execute a call where they run; None if they can."""
    if call.scale <= 0:
        return f"backend triton: scale {call.scale} is not positive"
    if max(call.q.shape[-1], call.v.shape[-1]) > 256:
        return f"backend triton: head_dim {max(call.q.shape[-1], call.v.shape[-1])} is above 256"
    return None


def unsupported(call: AttentionCall, backend: str) -> str | None:
    """Why a backend cannot serve a call, in an op whose one kernel is Triton's; None if it can."""
    return triton_unsupported(call.q) or kernel_unsupported(call) if backend == "triton" else None


def fastest(call: AttentionCall) -> str:
    """The backend that "auto" stands for in such an op, and in one that selects by whole queries and keys."""
    return "triton" if takes_triton(call.q) and kernel_unsupported(call) is None else "torch"


def takes_triton(x: torch.Tensor) -> bool:
    """Whether an op that chooses for itself takes its Triton kernel for a tensor: on every GPU that it runs on."""
    return x.is_cuda and triton_unsupported(x) is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _interprets() -> bool:
    """Whether Triton's interpreter is on; torch.compile cannot trace the question."""
    import triton

    return bool(triton.knobs.runtime.interpret)
