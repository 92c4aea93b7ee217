"""PyTorch backend of the lists."""

import torch


def compact(marked: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.compact`."""
    capacity = marked.shape[-1]
    position = marked.cumsum(-1, dtype=torch.int32) - 1
    # What is not marked all writes to one spare slot, which is cut off again.
    lists = torch.zeros(*marked.shape[:-1], capacity + 1, dtype=torch.int32, device=marked.device)
    lists.scatter_(-1, torch.where(marked, position, capacity).long(), values)
    return lists[..., :capacity], marked.sum(-1, dtype=torch.int32)
