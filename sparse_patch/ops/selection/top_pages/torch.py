"""PyTorch backend of the lists of pages."""

import torch


def with_forced(scores: torch.Tensor, limits: torch.Tensor, first: int, last: int | torch.Tensor) -> torch.Tensor:
    """Scores `[B, L, N]` with +inf for the first and the last pages of each list; `limits` and `last` fit `[B, L]`."""
    page = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill((page < first) | (page >= (limits - last)[..., None]), torch.inf)


def top_pages(
    scores: torch.Tensor, limits: torch.Tensor, k: int, first: int = 0, last: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.top_pages`; `limits` is the number of real pages, int64 `[B, L]`, and `k` at most N."""
    size = scores.shape[-1]
    page = torch.arange(size, device=scores.device)
    if first or last:
        scores = with_forced(scores, limits, first, last)
    scores = torch.where(scores.isnan(), -torch.inf, scores).masked_fill(page >= limits[..., None], -torch.inf)
    # The lower page wins a tie, so a page beyond the limit never wins over a page of `-inf` within it.
    chosen = _ordered(scores, page).topk(k).indices
    counts = limits.clamp(0, k)
    has_meaning = torch.arange(k, device=scores.device) < counts[..., None]
    ascending = chosen.masked_fill(~has_meaning, size).sort().values
    return ascending.masked_fill(~has_meaning, 0).int(), counts.int()


def _ordered(scores: torch.Tensor, page: torch.Tensor) -> torch.Tensor:
    """Int64 numbers in the order of scores without NaN, without ties: of two equal scores, the lower page is higher."""
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32)  # one zero, not two
    rising = bits ^ (bits >> 31 & 0x7FFFFFFF)
    return (rising.long() << 32) - page
