"""PyTorch backend of the merge of rankings."""

import torch

from sparse_patch.ops.selection.top_pages.torch import ordered, top_pages


def merge(scores: torch.Tensor, limits: torch.Tensor, k: int, spared: int, first_head: int, heads: int) -> torch.Tensor:
    """`ops.selection.rank_merge.merged_scores` of some of the heads.

    Args:
        scores: float32 `[B, H, N]`.
        limits: int64 `[B]`.
        k: tokens of the merged list.
        spared: what is subtracted from the limits.
        first_head: index of the first of the H heads among all heads.
        heads: number of all heads.
    """
    limits = (limits - spared)[:, None].expand(scores.shape[:2])
    tokens = ordered(scores, limits).topk(min(k, scores.shape[-1])).indices  # by rank
    rank = torch.arange(tokens.shape[-1], device=scores.device)
    head = first_head + torch.arange(scores.shape[1], dtype=torch.float32, device=scores.device)
    score = (k * heads - rank.float() * heads - head[:, None]) * (rank < limits[..., None])
    merged = scores.new_zeros(scores.shape[0], scores.shape[-1])
    return merged.scatter_reduce_(-1, tokens.flatten(1), score.flatten(1), "amax")


def merged_list(
    scores: torch.Tensor, limits: torch.Tensor, most: int, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.rank_merge.merged_list`."""
    merged = merge(scores, limits, most - last, last, 0, scores.shape[1])
    return top_pages(
        merged[:, None], limits.clamp(max=merged.shape[1])[:, None], min(most, merged.shape[1]), first, last
    )
