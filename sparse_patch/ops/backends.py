"""Where the Triton kernels of the ops run."""

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.availability import prefers_triton, why_no_triton

# What an op without a kernel of flash-attn-4 chooses for itself; a configuration may name flash for another op.
DEFERS_TO_AUTO = ("auto", "flash")


def why_no_kernel(call: AttentionCall) -> str | None:
    """Why the Triton kernels of attention cannot execute a call where they run; None if they can."""
    if call.scale <= 0:
        return f"backend triton: scale {call.scale} is not positive"
    if max(call.q.shape[-1], call.v.shape[-1]) > 256:
        return f"backend triton: head_dim {max(call.q.shape[-1], call.v.shape[-1])} is above 256"
    return None


def why_unsupported(call: AttentionCall, backend: str) -> str | None:
    """Why a backend cannot serve a call, in an op whose one kernel is Triton's; None if it can."""
    return why_no_triton(call.q) or why_no_kernel(call) if backend == "triton" else None


def fastest(call: AttentionCall) -> str:
    """The backend that "auto" stands for in such an op, and in one that selects by whole queries and keys."""
    return "triton" if prefers_triton(call.q) and why_no_kernel(call) is None else "torch"
