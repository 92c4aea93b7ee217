"""Lists of what is marked in a map: fixed capacity and counts, no host sync."""

import torch


def compact(marked: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The marked values of each row, in order, at the front of a list as long as the row.

    Args:
        marked: bool `[..., n]`.
        values: int32 `[..., n]`.

    Returns:
        The lists, int32 `[..., n]`, of which the first `counts` entries have a meaning; the counts, int32 `[...]`.
    """
    capacity = marked.shape[-1]
    position = marked.cumsum(-1, dtype=torch.int32) - 1
    # What is not marked all writes to one spare slot, which is cut off again.
    lists = torch.zeros(*marked.shape[:-1], capacity + 1, dtype=torch.int32, device=marked.device)
    lists.scatter_(-1, torch.where(marked, position, capacity).long(), values)
    return lists[..., :capacity], marked.sum(-1, dtype=torch.int32)
