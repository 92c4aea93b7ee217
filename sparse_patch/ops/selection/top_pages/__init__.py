"""The pages of the highest scores, as the lists of a `PagePlan`."""

from torch import Tensor

from sparse_patch.kernels.availability import prefers_triton


def top_pages(scores: Tensor, limits: Tensor, k: int, page_size: int = 1) -> tuple[Tensor, Tensor]:
    """The `min(k, limit)` highest of the first `limit` scores of each list, by number.

    A page of score `+inf` is chosen before all others, one of `-inf` or NaN only when nothing else is left; of equal
    scores the lower page wins. Exact, without a host sync.

    Args:
        scores: float32 `[B, L, N]`.
        limits: pages that each row, or each list, really has, or with a `page_size` the tokens of them: int64 `[B]` or
            `[B, L]`; at most N pages count.
        k: pages to choose; more than N are N.
        page_size: tokens of a page, where `limits` are tokens.

    Returns:
        The pages, int32 `[B, L, min(k, N)]`, in ascending order; what follows the first `counts` has no meaning but is
        a page number below N. The counts, int32 `[B, L]`.
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

    return in_torch(scores, -(-limits // page_size) if page_size > 1 else limits, k)
