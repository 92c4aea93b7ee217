"""Precision of attention under `torch.autocast`: one cast of queries, keys and values, and none after it."""

import torch


def as_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype in which autocast has the model's own attention run; unchanged without autocast.

    Autocast leaves float64 as it is, and so does this.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
