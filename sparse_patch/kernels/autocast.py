"""Precision of attention under `torch.autocast`: queries, keys and values are cast once; nothing is cast later."""

import torch


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast tensors to the dtype that autocast gives the model's own attention; without autocast, change nothing.

    Autocast leaves float64 as it is, and so does this function.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
