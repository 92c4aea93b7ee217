"""PyTorch backend of the pages' statistics and scores."""

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.ops.selection.page_statistics.pages import pages_of


def refresh(call: AttentionCall, tensors: list[torch.Tensor], tokens: int, page_size: int, offset: int) -> None:
    """Compute, in place, the pages of each row that hold one of its last `tokens` tokens: bounds or means."""
    if call.kv_start is None and call.kv_end is None:
        _refresh_alike(call, tensors, tokens, page_size, offset)
    else:
        _refresh_rows(call, tensors, tokens, page_size, offset)


def _refresh_alike(call: AttentionCall, tensors: list[torch.Tensor], tokens: int, page_size: int, offset: int) -> None:
    """`refresh` if all rows are as long as the call: the pages are slices, first the full ones, then the last one."""
    first, full = max(call.kv_length - tokens - offset, 0) // page_size, (call.kv_length - offset) // page_size
    for begin, end, size in ((first, full, page_size), (full, full + 1, (call.kv_length - offset) % page_size)):
        if begin < end and size:
            at = offset + begin * page_size
            keys = call.k[:, :, at : at + (end - begin) * size].unflatten(2, (end - begin, size))
            for tensor, value in zip(tensors, _statistics(keys, None, len(tensors)), strict=True):
                tensor[:, :, begin:end] = value


def _refresh_rows(call: AttentionCall, tensors: list[torch.Tensor], tokens: int, page_size: int, offset: int) -> None:
    """`refresh` if only the device knows where rows begin or end.

    Each row has its pages in a window of as many pages as any row can need. If the window would run out of the tensors,
    it begins earlier; an earlier page gets the values that it had.
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
    keys = call.k.transpose(1, 2)[rows[..., None], index].movedim(3, 1)  # [B, Hkv, T, P, D]
    for tensor, value in zip(tensors, _statistics(keys, real, len(tensors)), strict=True):
        tensor.transpose(1, 2)[rows, page] = value.transpose(1, 2).to(tensor.dtype)


def _statistics(keys: torch.Tensor, real: torch.Tensor | None, number: int) -> list[torch.Tensor]:
    """Bounds or mean of pages `[B, Hkv, T, P, D]`, `[B, Hkv, T, D]` each; of the `real` keys, bool `[B, T, P]`."""
    if real is None:
        return [keys.mean(3, dtype=torch.float32)] if number == 1 else [keys.amin(3), keys.amax(3)]
    absent = ~real[:, None, ..., None]
    if number == 1:
        count = real.sum(-1).clamp(min=1)[:, None, :, None]
        return [keys.masked_fill(absent, 0.0).sum(3, dtype=torch.float32) / count]
    return [keys.masked_fill(absent, torch.inf).amin(3), keys.masked_fill(absent, -torch.inf).amax(3)]


def bound_scores(
    q: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    group: str | None = None,
) -> torch.Tensor:
    """See `ops.selection.page_statistics`."""
    scores = _products(q.clamp(min=0), high).baddbmm_(*_factors(q.clamp(max=0), low))
    return _of_pages(scores, q, lengths, page_size, 0, group)


def mean_scores(
    q: torch.Tensor,
    means: torch.Tensor,
    lengths: torch.Tensor,
    page_size: int,
    offset: int = 0,
    group: str | None = None,
) -> torch.Tensor:
    """See `ops.selection.page_statistics`."""
    return _of_pages(_products(q, means), q, lengths, page_size, offset, group)


def _products(q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Products of queries `[B, Hq, D]` with the vectors of pages `[B, Hkv, Np, D]`, float32 `[B * Hkv, G, Np]`."""
    return torch.bmm(*_factors(q, pages))


def _factors(q: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, kv_heads, _, head_dim = pages.shape
    return q.float().reshape(batch * kv_heads, -1, head_dim), pages.float().flatten(0, 1).mT


def _of_pages(
    scores: torch.Tensor, q: torch.Tensor, lengths: torch.Tensor, page_size: int, offset: int, group: str | None
) -> torch.Tensor:
    """Scores of query heads, `[B, Hq, Np]`, or what `group` makes of those of a KV head; `-inf` without a real key."""
    if group is not None:
        scores = scores.amax(1) if group == "max" else scores.sum(1) if group == "sum" else scores.mean(1)
    first = torch.arange(offset, offset + scores.shape[-1] * page_size, page_size, device=scores.device)
    in_rows = scores.reshape(len(q), scores.shape[:-1].numel() // len(q), scores.shape[-1])
    return in_rows.masked_fill_((first >= lengths[:, None])[:, None], -torch.inf)
