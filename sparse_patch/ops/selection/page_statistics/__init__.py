"""Statistics of the keys of each page, kept from step to step, and scores of pages from them.

Page `u` of a row holds its tokens `offset + u * page_size ...`, counted from the row's first key. Statistics lie in
`call.kv_state` and follow one rule: every call recomputes from the keys all pages that hold one of its tokens, and
pages at or after a row's length are never read. So after appending, cropping and reordering, the statistics are those
of the current keys. A state that is empty, or whose tokens end before the call's tokens begin, is filled from all keys.
A state keeps the statistics of one kind: another page size, offset or kind replaces them.
"""

from typing import Literal

from torch import Tensor

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.availability import prefers_triton
from sparse_patch.ops.selection.page_statistics.update import up_to_date

Group = Literal["sum", "max", "mean"]  # how the scores of a GQA group's query heads become one


def page_bounds(call: AttentionCall, page_size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel over the keys of each page (Quest, arXiv 2406.10774).

    Returns:
        Both `[B, Hkv, ceil(kv_length / page_size), D]` in the dtype of the keys; views of `call.kv_state`, if there is
        one. Values of pages without a real key are undefined and may be NaN.
    """
    names = (f"low/{page_size}", f"high/{page_size}")
    low, high = up_to_date(call, names, page_size, offset=0)
    return low, high


def page_means(call: AttentionCall, page_size: int, offset: int = 0) -> Tensor:
    """Mean of the keys of each page (Kinetics, arXiv 2506.05333, whose pages begin after 4 sinks: `offset` 4).

    Returns:
        `[B, Hkv, ceil((kv_length - offset) / page_size), D]` in the dtype of the keys, like `page_bounds`.
    """
    (means,) = up_to_date(call, (f"means/{page_size}+{offset}",), page_size, offset)
    return means


def bound_scores(
    q: Tensor, low: Tensor, high: Tensor, lengths: Tensor, page_size: int, group: Group | None = None
) -> Tensor:
    """Upper bound of `q @ key` over the keys of each page: `sum_d max(q_d * low_d, q_d * high_d)` (Quest).

    Args:
        q: `[B, Hq, D]`, the last query of the call.
        low: `[B, Hkv, Np, D]`, from `page_bounds`.
        high: as `low`.
        lengths: tokens of each row, int64 `[B]`.
        page_size: tokens per page.
        group: how the scores of a group's heads become one; None for a score of each head.

    Returns:
        float32 `[B, Hq, Np]`, or `[B, Hkv, Np]` with a `group`; not scaled; `-inf` for pages without a real key.
    """
    if prefers_triton(q):
        from sparse_patch.ops.selection.page_statistics.triton import bound_scores as scores
    else:
        from sparse_patch.ops.selection.page_statistics.torch import bound_scores as scores
    return scores(q, low, high, lengths, page_size, group)


def mean_scores(
    q: Tensor, means: Tensor, lengths: Tensor, page_size: int, offset: int = 0, group: Group | None = None
) -> Tensor:
    """`q @ mean key` of each page, which is the mean of its keys' logits before scaling (Kinetics).

    Args:
        q: `[B, Hq, D]`, the last query of the call.
        means: `[B, Hkv, Np, D]`, from `page_means`.
        lengths: tokens of each row, int64 `[B]`.
        page_size: tokens per page.
        offset: position within the row of the first page's first token.
        group: as for `bound_scores`.

    Returns:
        As `bound_scores`.
    """
    if prefers_triton(q):
        from sparse_patch.ops.selection.page_statistics.triton import mean_scores as scores
    else:
        from sparse_patch.ops.selection.page_statistics.torch import mean_scores as scores
    return scores(q, means, lengths, page_size, offset, group)
