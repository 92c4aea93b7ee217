"""The pages with the highest scores, as the lists of a `PagePlan`."""

from torch import Tensor, arange, inf

from sparse_patch.kernels.availability import prefers_triton


def top_pages(scores: Tensor, limits: Tensor, k: int, page_size: int = 1) -> tuple[Tensor, Tensor]:
    """The pages of the `min(k, limit)` highest among the first `limit` scores of each list, in ascending order.

    A page of score `+inf` is chosen before all others, a page of `-inf` or NaN only if nothing else is left. Of equal
    scores the lower page wins. The choice is exact and needs no host sync.

    Args:
        scores: float32 `[B, L, N]`.
        limits: real pages of each row or of each list, or their tokens if `page_size` is given: int64 `[B]` or
            `[B, L]`; at most N pages count.
        k: pages to choose; at most N are chosen.
        page_size: tokens per page, if `limits` are tokens.

    Returns:
        The pages, int32 `[B, L, min(k, N)]`, in ascending order, and the counts, int32 `[B, L]`. Entries after the
        first `counts` have no meaning, but are page numbers below N.
    """
    k = min(k, scores.shape[-1])
    limits = limits[:, None] if limits.ndim == 1 else limits
    limits = limits.expand(scores.shape[:2])
    if prefers_triton(scores):
        from sparse_patch.ops.selection.top_pages.triton import top_pages as by_kernel
        from sparse_patch.ops.selection.top_pages.triton import why_unsupported

        if why_unsupported(scores, k) is None:
            return by_kernel(scores, limits, k, page_size)
    from sparse_patch.ops.selection.top_pages.torch import top_pages as in_torch

    return in_torch(scores, (limits + (page_size - 1)) // page_size if page_size > 1 else limits, k)


def best_first(scores: Tensor, limits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The pages of `top_pages`, int64, the highest score first; the arguments and the counts are those of `top_pages`.

    Args:
        scores: float32 `[B, L, N]`.
        limits: real pages of each row, int64 `[B]`.
        k: pages to choose.
    """
    if not prefers_triton(scores):
        from sparse_patch.ops.selection.top_pages.torch import best_first as in_torch

        return in_torch(scores, limits[:, None].expand(scores.shape[:2]), min(k, scores.shape[-1]))
    pages, counts = top_pages(scores, limits, k)
    pages = pages.long()
    listed = arange(pages.shape[-1], device=scores.device) < counts[..., None]
    values = scores.gather(-1, pages)
    values = values.masked_fill(values.isnan() | ~listed, -inf)  # stable: unlisted pages come last
    return pages.gather(-1, values.sort(dim=-1, descending=True, stable=True).indices), counts
