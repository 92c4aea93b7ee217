"""One list of tokens for all heads, from the ranking of each head: the merge of LessIsMore."""

from torch import Tensor

from sparse_patch.kernels.availability import prefers_triton
from sparse_patch.ops.selection.top_pages import top_pages
from sparse_patch.tensor_parallel import ALL_HEADS, HeadShard


def merged_scores(scores: Tensor, limits: Tensor, k: int, *, spared: int = 0, shard: HeadShard = ALL_HEADS) -> Tensor:
    """Scores by which the heads' top k are merged: rank by rank and, within a rank, head by head.

    The merged list of k tokens is `top_pages(merged_scores(scores, limits, k)[:, None], limits, k)`. It is the heads'
    lists merged in rank order, with every token once, and cut to the first k (LessIsMore, arXiv 2508.07101). The paper
    leaves the order of heads within a rank open; here it is their index. Ties within a head go to the lower token.

    Args:
        scores: float32 `[B, Hq, N]`; NaN counts as `-inf`.
        limits: number of first tokens of each row that may be listed, int64 `[B]`.
        k: tokens of the merged list.
        spared: what is subtracted from the limits.
        shard: the part of the layer's heads that have these scores; the scores of all processes are merged.

    Returns:
        float32 `[B, N]`: `k * heads - (rank * heads + head)` for the best place that any head gives the token; the
        best token of head 0 has `k * heads`. Tokens that are in no head's top k or lie at or after the limit have 0;
        all other scores differ.
    """
    here = scores.shape[1]
    heads = shard.rank * here, shard.size * here
    if prefers_triton(scores):
        from sparse_patch.ops.selection.rank_merge.triton import merge as by_kernel

        return shard.highest(by_kernel(scores, limits, k, spared, *heads))
    from sparse_patch.ops.selection.rank_merge.torch import merge as in_torch

    return shard.highest(in_torch(scores, limits, k, spared, *heads))


def merged_list(
    scores: Tensor, limits: Tensor, most: int, *, first: int = 0, last: int = 0, shard: HeadShard = ALL_HEADS
) -> tuple[Tensor, Tensor]:
    """The first and the last tokens and, between them, those that come first in the merged list of `merged_scores`.

    That list is of `most - last` tokens, none of them among the last ones.

    Args:
        scores: float32 `[B, Hq, N]`.
        limits: tokens of each row, int64 `[B]`.
        most: tokens to list, at least `first + last`.
        first: first tokens of each row that are listed.
        last: last tokens of each row that are listed.
        shard: as for `merged_scores`.

    Returns:
        As `top_pages`: int32 `[B, 1, min(most, N)]`, ascending, and counts, int32 `[B, 1]`.
    """
    if shard.size > 1:
        merged = merged_scores(scores, limits, most - last, spared=last, shard=shard)
        return top_pages(merged[:, None], limits, most, first=first, last=last)
    if prefers_triton(scores):
        from sparse_patch.ops.selection.rank_merge.triton import merged_list as by_kernel

        return by_kernel(scores, limits, most, first, last)
    from sparse_patch.ops.selection.rank_merge.torch import merged_list as in_torch

    return in_torch(scores, limits, most, first, last)
