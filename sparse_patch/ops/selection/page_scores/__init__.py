"""Scores of pages from the attention of one query: DELTA ranks by them."""

from torch import Tensor

from sparse_patch.kernels.availability import prefers_triton
from sparse_patch.tensor_parallel import ALL_HEADS, HeadShard


def page_scores(logits: Tensor, lse: Tensor, lengths: Tensor, page_size: int, shard: HeadShard = ALL_HEADS) -> Tensor:
    """The attention that a page's tokens get, each from the head that attends to it most.

    A token's score is the largest probability that any query head gives it. A page's score is the sum over its tokens:
    the sum of maxima, not the maximum of sums (DELTA, arXiv 2510.09883).

    Args:
        logits: float32 `[B, Hq, S]`, scaled, by position within the row; entries at or after the row's length are not
            used.
        lse: float32 `[B, Hq]`, natural logarithm.
        lengths: tokens of each row, int64 `[B]`.
        page_size: tokens per page.
        shard: the part of the layer's heads that is given; the scores are of the heads of all processes.

    Returns:
        float32 `[B, ceil(S / page_size)]`; `-inf` for pages without a token.
    """
    if shard.size > 1:
        from sparse_patch.ops.selection.page_scores.torch import pages_of_tokens

        of_tokens = shard.highest(page_scores(logits, lse, lengths, 1))
        return pages_of_tokens(of_tokens, lengths, page_size)
    if prefers_triton(logits) and page_size in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        from sparse_patch.ops.selection.page_scores.triton import page_scores as scores
    else:
        from sparse_patch.ops.selection.page_scores.torch import page_scores as scores
    return scores(logits, lse, lengths, page_size)
