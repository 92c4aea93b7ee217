"""Dense causal attention by the available kernels, for the baselines of `sparse-patch bench` and `dense: best`.

Kernels: `flash4` (flash-attn-4, Hopper), `cudnn`, `flash2` and `efficient` (backends of PyTorch's SDPA) and `sdpa`
(whatever SDPA picks, on any device). Contract of every kernel: grouped KV heads without repeating them, any scale, no
padding and no softcap; `why_unsupported` names its other limits.
"""

from sparse_patch.ops.attention.dense.dispatch import KERNELS, attend, fastest, why_unsupported

__all__ = ["KERNELS", "attend", "fastest", "why_unsupported"]
