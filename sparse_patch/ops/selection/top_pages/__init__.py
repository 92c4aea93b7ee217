"""The pages with the highest scores, as the lists of a `PagePlan`."""

from torch import Tensor

from sparse_patch.kernels.availability import prefers_triton


def top_pages(
    scores: Tensor, limits: Tensor, k: int, page_size: int = 1, *, spared: int = 0, first: int = 0, last: int = 0
) -> tuple[Tensor, Tensor]:
    """The pages of the `min(k, limit)` highest among the first `limit` scores of each list, in ascending order.

    A page of score `+inf` is chosen before all others, a page of `-inf` or NaN only if nothing else is left. Of equal
    scores the lower page wins. The choice is exact and needs no host sync.

    Args:
        scores: float32 `[B, L, N]`.
        limits: real pages of each row or of each list, or their tokens if `page_size` is given: int64 `[B]` or
            `[B, L]`; at most N pages count.
        k: pages to choose; at most N are chosen.
        page_size: tokens per page, if `limits` are tokens.
        spared: what is subtracted from the limits.
        first: first pages of each list whose score counts as +inf.
        last: last real pages of each list whose score counts as +inf.

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
            return by_kernel(scores, limits, k, page_size, spared, first, last)
    from sparse_patch.ops.selection.top_pages.torch import top_pages as in_torch

    limits = limits - spared if spared else limits
    real = (limits + (page_size - 1)) // page_size if page_size > 1 else limits
    return in_torch(scores, real.clamp(max=scores.shape[-1]) if last else real, k, first, last)
