"""One list of tokens for all heads, from the ranking of each head: the merge of LessIsMore."""

import torch

from sparse_patch.ops.selection.top_pages import best_first
from sparse_patch.tensor_parallel import ALL_HEADS, HeadShard


def merged_ranks(scores: torch.Tensor, limits: torch.Tensor, k: int, shard: HeadShard = ALL_HEADS) -> torch.Tensor:
    """The place of each token when the heads' top k are merged: rank by rank and, within a rank, head by head.

    The merged list of k tokens is `top_pages(-merged_ranks(scores, limits, k)[:, None], limits, k)`. It is the heads'
    lists merged in rank order, with every token once, and cut to the first k (LessIsMore, arXiv 2508.07101). The paper
    leaves the order of heads within a rank open; here it is their index. Ties within a head go to the lower token.

    Args:
        scores: float32 `[B, Hq, N]`; NaN counts as `-inf`.
        limits: number of first tokens of each row that may be listed, int64 `[B]`.
        k: tokens of the merged list.
        shard: the part of the layer's heads that have these scores; the scores of all processes are merged.

    Returns:
        float32 `[B, N]`: `rank * heads + head` of the best place that any head gives the token; 0 is the best. Tokens
        that are in no head's top k or lie at or after the limit have `inf`; all other values differ.
    """
    here = scores.shape[1]
    tokens, counts = best_first(scores, limits, k)
    rank = torch.arange(tokens.shape[-1], dtype=torch.float32, device=scores.device)
    head = shard.rank * here + torch.arange(here, dtype=torch.float32, device=scores.device)
    place = (rank * (here * shard.size) + head[:, None]).masked_fill(rank >= counts[..., None], torch.inf)
    merged = scores.new_full((scores.shape[0], scores.shape[-1]), torch.inf)
    return shard.lowest(merged.scatter_reduce_(-1, tokens.flatten(1), place.flatten(1), "amin"))
