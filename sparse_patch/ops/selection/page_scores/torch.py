"""PyTorch backend of the pages' scores."""

import torch
import torch.nn.functional as F


def page_scores(logits: torch.Tensor, lse: torch.Tensor, lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    """See `ops.selection.page_scores`."""
    token = torch.arange(logits.shape[-1], device=logits.device)
    log_probability = (logits - lse[..., None]).amax(1)
    probability = log_probability.exp().masked_fill(token >= lengths[:, None], 0.0)
    return pages_of_tokens(probability, lengths, page_size)


def pages_of_tokens(scores: torch.Tensor, lengths: torch.Tensor, page_size: int) -> torch.Tensor:
    """Scores of pages from those of tokens, float32 `[B, S]`: at most 0 for tokens that a row does not have."""
    pages = F.pad(scores.clamp(min=0), (0, -scores.shape[-1] % page_size)).unflatten(-1, (-1, page_size))
    first = torch.arange(pages.shape[1], device=scores.device) * page_size
    return pages.sum(-1).masked_fill(first >= lengths[:, None], -torch.inf)
