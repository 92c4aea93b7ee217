"""When the Triton kernels of the ops can run."""

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.availability import prefers_triton, why_no_triton

# For these names, an op without a flash-attn-4 kernel chooses itself; a configuration may name flash for another op.
DEFERS_TO_AUTO = ("auto", "flash")


def why_no_kernel(call: AttentionCall) -> str | None:
    """Why the Triton attention kernels cannot execute a call on a device that runs Triton; None if they can."""
    if call.scale <= 0:
        return f"backend triton: scale {call.scale} is not positive"
    if max(call.q.shape[-1], call.v.shape[-1]) > 256:
        return f"backend triton: head_dim {max(call.q.shape[-1], call.v.shape[-1])} is above 256"
    return None


def why_unsupported(call: AttentionCall, backend: str) -> str | None:
    """Why a backend cannot serve a call, for an op whose only kernel is in Triton; None if it can."""
    return why_no_triton(call.q) or why_no_kernel(call) if backend == "triton" else None


def fastest(call: AttentionCall) -> str:
    """The backend of "auto" for such an op, and for an op that selects by whole queries and keys."""
    return "triton" if prefers_triton(call.q) and why_no_kernel(call) is None else "torch"
