"""PyTorch backend of `compact`."""

import torch


def compact(marked: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.compaction.compact`."""
    capacity = marked.shape[-1]
    position = marked.cumsum(-1, dtype=torch.int32) - 1
    # Entries that are not marked all write to one spare slot, which is cut off afterwards.
    lists = torch.zeros(*marked.shape[:-1], capacity + 1, dtype=torch.int32, device=marked.device)
    lists.scatter_(-1, torch.where(marked, position, capacity).long(), values)
    return lists[..., :capacity], marked.sum(-1, dtype=torch.int32)
