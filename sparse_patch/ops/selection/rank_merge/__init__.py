"""One list of tokens for all heads, from the ranking of each head: the merge of LessIsMore."""

from torch import Tensor

from sparse_patch.kernels.availability import prefers_triton
from sparse_patch.ops.selection.top_pages import top_pages
from sparse_patch.tensor_parallel import ALL_HEADS, HeadShard


def merged_scores(scores: Tensor, limits: Tensor, k: int, shard: HeadShard = ALL_HEADS) -> Tensor:
    """Scores by which the heads' top k are merged: rank by rank and, within a rank, head by head.

    The merged list of k tokens is `top_pages(merged_scores(scores, limits, k)[:, None], limits, k)`. It is the heads'
    lists merged in rank order, with every token once, and cut to the first k (LessIsMore, arXiv 2508.07101). The paper
    leaves the order of heads within a rank open; here it is their index. Ties within a head go to the lower token.

    Args:
        scores: float32 `[B, Hq, N]`; NaN counts as `-inf`.
        limits: number of first tokens of each row that may be listed, int64 `[B]`.
        k: tokens of the merged list.
        shard: the part of the layer's heads that have these scores; the scores of all processes are merged.

    Returns:
        float32 `[B, N]`: `k * heads - (rank * heads + head)` for the best place that any head gives the token; the
        best token of head 0 has `k * heads`. Tokens that are in no head's top k or lie at or after the limit have 0;
        all other scores differ.
    """
    lists, here = top_pages(scores, limits, k), scores.shape[1]
    heads = shard.rank * here, shard.size * here
    if prefers_triton(scores):
        from sparse_patch.ops.selection.rank_merge.triton import merge as by_kernel

        return shard.highest(by_kernel(scores, *lists, k, *heads))
    from sparse_patch.ops.selection.rank_merge.torch import merge as in_torch

    return shard.highest(in_torch(scores, *lists, k, *heads))
