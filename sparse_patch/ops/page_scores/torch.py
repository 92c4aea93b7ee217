"""PyTorch backend of the pages' scores."""

import torch
import torch.nn.functional as F


def page_scores(
    logits: torch.Tensor, lse: torch.Tensor, lengths: torch.Tensor, page_size: int, recent: int = 0
) -> torch.Tensor:
    """See `ops.page_scores`."""
    token = torch.arange(logits.shape[-1], device=logits.device)
    log_probability = (logits - lse[..., None]).amax(1)
    probability = log_probability.exp().masked_fill(token >= lengths[:, None], 0.0)
    pages = F.pad(probability, (0, -logits.shape[-1] % page_size)).unflatten(-1, (-1, page_size))
    first = torch.arange(pages.shape[1], device=logits.device) * page_size
    is_recent = first >= (lengths - 1)[:, None] // page_size * page_size - (recent - 1) * page_size
    scores = pages.sum(-1).masked_fill(is_recent, torch.inf) if recent else pages.sum(-1)
    return scores.masked_fill(first >= lengths[:, None], -torch.inf)
