"""PyTorch backend of the lists of pages."""

import torch


def top_pages(scores: torch.Tensor, limits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.top_pages`; `limits` is int64 `[B, L]` and `k` at most N."""
    page = torch.arange(scores.shape[-1], device=scores.device)
    scores = scores.masked_fill(page >= limits[..., None], -torch.inf).nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    # The lower page wins a tie, so a page beyond the limit never wins over a page of `-inf` within it. Chosen pages
    # beyond the limit come last in ascending order, after the first `counts`.
    chosen = _ordered(scores, page).topk(k, sorted=False).indices
    return chosen.int().sort().values, limits.clamp(0, k).int()


def _ordered(scores: torch.Tensor, page: torch.Tensor) -> torch.Tensor:
    """Int64 numbers in the order of scores without NaN, without ties: of two equal scores, the lower page is higher."""
    bits = (scores + 0.0).view(torch.int32)  # one zero, not two
    rising = bits ^ (bits >> 31 & 0x7FFFFFFF)
    return torch.sub(rising.long() << 32, page)
