"""Dense decode kernels of other projects, as baselines: PyTorch's SDPA backends, flash-attn and flashinfer."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_patch.call import AttentionCall

_SDPA: dict[str, tuple[SDPBackend, Callable[..., bool]]] = {
    "sdpa flash": (SDPBackend.FLASH_ATTENTION, can_use_flash_attention),
    "sdpa cudnn": (SDPBackend.CUDNN_ATTENTION, can_use_cudnn_attention),
    "sdpa efficient": (SDPBackend.EFFICIENT_ATTENTION, can_use_efficient_attention),
}
_PACKAGES = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flashinfer": "flashinfer"}
KERNELS = ("sdpa", *_SDPA, *_PACKAGES)  # "sdpa": the backend that SDPA picks by itself


def why_unsupported(call: AttentionCall, kernel: str) -> str | None:
    """Why a kernel cannot serve a call of one query over the whole buffer; None if it can."""
    if kernel == "sdpa":
        return None
    if not call.q.is_cuda:
        return "needs a CUDA device"
    if kernel in _SDPA:
        backend, serves = _SDPA[kernel]
        with sdpa_kernel(backend):
            if not serves(SDPAParams(call.q, call.k, call.v, None, 0.0, False, call.group_size > 1)):
                return "PyTorch does not run it for this call on this GPU"
        return None
    if find_spec(_PACKAGES[kernel]) is None:
        return f"package {_PACKAGES[kernel]} is not installed"
    if kernel.startswith("flash-attn") and _flash_attn(kernel) is None:
        return f"package {_PACKAGES[kernel]} has no flash_attn_with_kvcache"
    if kernel == "flashinfer" and call.q.shape[0] > 1:
        return "one row at a time only"
    return None


def prepared(call: AttentionCall, length: int, kernel: str) -> Callable[[], torch.Tensor]:
    """Return a function that attends to the first `length` keys of a call. Its inputs are laid out beforehand.

    Args:
        call: a decode call of one query.
        length: number of valid keys.
        kernel: one of `KERNELS` for which `why_unsupported` gives None.
    """
    q, k, v = call.q, call.k[:, :, :length], call.v[:, :, :length]
    if kernel.startswith("flash-attn"):
        attend = _flash_attn(kernel)
        assert attend is not None, "asked about before"
        seen = torch.full((len(q),), length, dtype=torch.int32, device=q.device)
        whole = [x.transpose(1, 2) for x in (q, call.k, call.v)]
        return lambda: attend(*whole, cache_seqlens=seen, softmax_scale=call.scale)
    if kernel == "flashinfer":
        import flashinfer

        one = [q[0, :, 0], k[0], v[0]]
        return lambda: flashinfer.single_decode_with_kv_cache(*one, kv_layout="HND", sm_scale=call.scale)

    def sdpa() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, scale=call.scale, enable_gqa=call.group_size > 1
        )

    def only() -> torch.Tensor:
        with sdpa_kernel(_SDPA[kernel][0]):
            return sdpa()

    return only if kernel in _SDPA else sdpa


def _flash_attn(kernel: str) -> Any:
    """flash-attn's decode function; None if the installed package has none (flash-attn-4)."""
    try:
        if kernel == "flash-attn 3":
            from flash_attn_interface import flash_attn_with_kvcache
        else:
            from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    return flash_attn_with_kvcache
