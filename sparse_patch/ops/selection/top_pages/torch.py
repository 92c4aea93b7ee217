"""PyTorch backend of the lists of pages."""

import torch

from sparse_patch.kernels.compaction import compact

_MANY = 512  # pages; it is faster to mark so many and to read off the marks than to sort them


def with_forced(scores: torch.Tensor, limits: torch.Tensor, first: int, last: int | torch.Tensor) -> torch.Tensor:
    """Scores `[B, L, N]` with +inf for the first and the last pages of each list; `limits` and `last` fit `[B, L]`."""
    page = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill((page < first) | (page >= (limits - last)[..., None]), torch.inf)


def top_pages(
    scores: torch.Tensor, limits: torch.Tensor, k: int, first: int = 0, last: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.top_pages`; `limits` is the number of real pages, int64 `[B, L]`, and `k` at most N.

    Chosen pages beyond the limit come last in ascending order, after the first `counts`.
    """
    if first or last:
        scores = with_forced(scores, limits, first, last)
    chosen = ordered(scores, limits).topk(k, sorted=False).indices
    return _ascending(chosen, scores.shape[-1]), limits.clamp(0, k).int()


def _ascending(pages: torch.Tensor, size: int) -> torch.Tensor:
    """Lists of different pages below `size`, int64 `[B, L, k]`, in ascending order as int32."""
    k = pages.shape[-1]
    if k < _MANY:
        return pages.int().sort().values
    marked = torch.zeros(*pages.shape[:-1], 1, size, dtype=torch.bool, device=pages.device)
    marked.scatter_(-1, pages[..., None, :], True)
    lists, _ = compact(marked, torch.arange(size, dtype=torch.int32, device=pages.device).expand_as(marked))
    return lists[..., 0, :k]


def ordered(scores: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Int64 numbers in the order of the scores, without ties: of two equal scores, the lower page is higher.

    So a page beyond the limit never wins over a page of `-inf` within it.
    """
    page = torch.arange(scores.shape[-1], device=scores.device)
    scores = scores.masked_fill(page >= limits[..., None], -torch.inf).nan_to_num_(-torch.inf, torch.inf, -torch.inf)
    bits = scores.add_(0.0).view(torch.int32)  # one zero, not two
    rising = bits ^ (bits >> 31 & 0x7FFFFFFF)
    return rising.long().bitwise_left_shift_(32).sub_(page)
