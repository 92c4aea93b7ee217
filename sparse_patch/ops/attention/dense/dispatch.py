"""Choice of the dense kernel."""

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops.attention.dense import flash4, sdpa
from sparse_patch.ops.attention.op import Attended

KERNELS = ("flash4", *sdpa.BACKENDS)
# On one H200, bf16, head_dim 128: flash4 640-667 TFLOP/s, cuDNN 540-600, FlashAttention-2 320-350. Keys are
# major numbers of the compute capability; GPUs that were not measured are missing.
_FASTEST_FIRST = {8: ("flash2",), 9: ("flash4", "cudnn")}


def attend(call: AttentionCall, kernel: str) -> Attended:
    """Causal attention over every key.

    Args:
        call: the attention call.
        kernel: one of `KERNELS`.

    Returns:
        The output only: these kernels give no LSE.

    Raises:
        UnsupportedCallError: the kernel cannot serve the call; `why_unsupported` says so in advance.
    """
    if reason := why_unsupported(call, kernel):
        raise UnsupportedCallError(reason)
    return Attended(flash4.attend(call) if kernel == "flash4" else sdpa.attend(call, kernel))


def fastest(call: AttentionCall) -> str | None:
    """The fastest kernel that serves a call; None if none is known to beat the model's own attention, as on a CPU."""
    if not call.q.is_cuda:
        return None
    order = _FASTEST_FIRST.get(torch.cuda.get_device_capability(call.q.device)[0], ())
    return next((kernel for kernel in order if why_unsupported(call, kernel) is None), None)


def why_unsupported(call: AttentionCall, kernel: str) -> str | None:
    """Why a kernel cannot serve a call; None if it can."""
    if call.kv_start is not None:
        return f"kernel {kernel}: padding"
    if call.softcap is not None:
        return f"kernel {kernel}: softcap"
    return flash4.why_unsupported(call) if kernel == "flash4" else sdpa.why_unsupported(call, kernel)
