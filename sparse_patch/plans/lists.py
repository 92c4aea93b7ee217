"""Lists of numbers with a count each; plans consist of such lists."""

import torch


def leading(lists: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Which entries of lists `[..., n]` are among the first `counts` `[...]`, bool `[..., n]`."""
    return torch.arange(lists.shape[-1], device=counts.device) < counts[..., None]


def marked(lists: torch.Tensor, counts: torch.Tensor, size: int) -> torch.Tensor:
    """Lists of numbers below `size` as maps, bool `[..., size]`."""
    marked = torch.zeros(*lists.shape[:-1], size + 1, dtype=torch.bool, device=lists.device)
    target = torch.where(leading(lists, counts), lists, size)
    return marked.scatter_(-1, target.long(), True)[..., :-1]
