"""One list of tokens for all heads, out of a ranking by each: the merge of LessIsMore."""

import torch

from sparse_patch.ops.selection.top_pages import top_pages
from sparse_patch.tensor_parallel import ALL_HEADS, HeadShard


def merged_ranks(scores: torch.Tensor, limits: torch.Tensor, k: int, shard: HeadShard = ALL_HEADS) -> torch.Tensor:
    """Where each token stands when the heads' top k are merged: rank by rank and, within a rank, head by head.

    The merged list of k tokens is `top_pages(-merged_ranks(scores, limits, k)[:, None], limits, k)`: the heads' lists
    in rank order, merged, every token once, of which the first k are kept (LessIsMore, arXiv 2508.07101;
    the order of heads within a rank, which it leaves open, is their index). Ties within a head go to the lower token.

    Args:
        scores: float32 `[B, Hq, N]`; NaN counts as `-inf`.
        limits: tokens of each row that may be listed, the first ones: int64 `[B]`.
        k: tokens that the merged list is to have.
        shard: which of the layer's heads the scores are of; those of all processes are merged.

    Returns:
        float32 `[B, N]`, `rank * heads + head` of the best place that a head gives the token, 0 the best of all; no two
        alike but `inf`, for tokens that are in no head's top k or lie behind the limit.
    """
    here = scores.shape[1]
    tokens, counts = top_pages(scores, limits, k)
    tokens = tokens.long()
    listed = torch.arange(tokens.shape[-1], device=scores.device) < counts[..., None]
    values = scores.gather(-1, tokens)
    values = values.masked_fill(values.isnan() | ~listed, -torch.inf)  # stable: what is not listed stays behind
    in_order = tokens.gather(-1, values.sort(dim=-1, descending=True, stable=True).indices)
    rank = torch.arange(tokens.shape[-1], dtype=torch.float32, device=scores.device)
    head = shard.rank * here + torch.arange(here, dtype=torch.float32, device=scores.device)
    place = (rank * (here * shard.size) + head[:, None]).masked_fill(~listed, torch.inf)
    merged = scores.new_full((scores.shape[0], scores.shape[-1]), torch.inf)
    return shard.lowest(merged.scatter_reduce_(-1, in_order.flatten(1), place.flatten(1), "amin"))
