"""PyTorch backend of the pages' statistics and scores."""

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.ops.selection.page_statistics.pages import pages_of


def refresh(call: AttentionCall, tensors: list[torch.Tensor], tokens: int, page_size: int, offset: int) -> None:
    """Compute, in place, the pages of each row that hold one of its last `tokens` tokens: bounds or means.

    Each row has them in a window of as many pages as any row can need. If the window would run out of the tensors, it
    begins earlier; an earlier page gets the values that it had.
    """
    rows = torch.arange(len(call.k), device=call.k.device)[:, None]
    starts, lengths = call.row_starts()[:, None], call.lengths()[:, None]
    capacity = tensors[0].shape[2]
    number = min(pages_of(tokens, page_size), capacity)
    first = ((lengths - tokens - offset).clamp(min=0) // page_size).clamp(max=capacity - number)
    page = first + torch.arange(number, device=rows.device)  # [B, T]
    position = (offset + page * page_size)[..., None] + torch.arange(page_size, device=rows.device)
    real = position < lengths[..., None]
    index = (starts[..., None] + position).clamp(max=call.kv_length - 1)
    keys = call.k.transpose(1, 2)[rows[..., None], index]  # [B, T, P, Hkv, D]
    for tensor, value in zip(tensors, _statistics(keys, real, len(tensors)), strict=True):
        tensor.transpose(1, 2)[rows, page] = value.to(tensor.dtype)


def _statistics(keys: torch.Tensor, real: torch.Tensor, number: int) -> list[torch.Tensor]:
    """Bounds or mean over the real keys among `[B, T, P, Hkv, D]`, `[B, T, Hkv, D]` each."""
    absent = ~real[..., None, None]
    if number == 1:
        count = real.sum(-1).clamp(min=1)[..., None, None]
        return [keys.masked_fill(absent, 0.0).sum(2, dtype=torch.float32) / count]
    return [keys.masked_fill(absent, torch.inf).amin(2), keys.masked_fill(absent, -torch.inf).amax(2)]


def bound_scores(
    q: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    group: str | None = None,
) -> torch.Tensor:
    """See `ops.selection.page_statistics`."""
    scores = _products(q.clamp(min=0), high) + _products(q.clamp(max=0), low)
    return _of_pages(_of_lists(scores, low.shape[1], group), lengths, page_size, 0)


def mean_scores(
    q: torch.Tensor,
    means: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    offset: int = 0,
    group: str | None = None,
) -> torch.Tensor:
    """See `ops.selection.page_statistics`."""
    return _of_pages(_of_lists(_products(q, means), means.shape[1], group), lengths, page_size, offset)


def _products(q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Products of queries `[B, Hq, D]` with the vectors of pages `[B, Hkv, Np, D]`, float32 `[B, Hq, Np]`."""
    grouped = q.float().unflatten(1, (pages.shape[1], -1))
    return (grouped @ pages.float().transpose(-1, -2)).flatten(1, 2)


def _of_lists(scores: torch.Tensor, kv_heads: int, group: str | None) -> torch.Tensor:
    """Scores of query heads, `[B, Hq, Np]`, or what `group` makes of those of a KV head."""
    if group is None:
        return scores
    of_groups = scores.unflatten(1, (kv_heads, -1))
    return of_groups.amax(2) if group == "max" else of_groups.sum(2) if group == "sum" else of_groups.mean(2)


def _of_pages(scores: torch.Tensor, lengths: torch.Tensor, page_size: int, offset: int) -> torch.Tensor:
    first = offset + torch.arange(scores.shape[-1], device=scores.device) * page_size
    return scores.masked_fill((first >= lengths[:, None])[:, None], -torch.inf)
