"""PyTorch backend of the merge of rankings."""

import torch


def merge(
    scores: torch.Tensor, tokens: torch.Tensor, counts: torch.Tensor, k: int, first_head: int, heads: int
) -> torch.Tensor:
    """`ops.selection.rank_merge.merged_scores` of some of the heads.

    Args:
        scores: float32 `[B, H, N]`.
        tokens: the top k of each head in ascending order, int32 `[B, H, n]`, of which the first `counts` count.
        counts: int32 `[B, H]`.
        k: tokens of the merged list.
        first_head: index of the first of the H heads among all heads.
        heads: number of all heads.
    """
    tokens = tokens.long()
    listed = torch.arange(tokens.shape[-1], device=scores.device) < counts[..., None]
    values = scores.gather(-1, tokens)
    values = values.masked_fill(values.isnan() | ~listed, -torch.inf)  # stable: unlisted tokens come last
    in_order = tokens.gather(-1, values.sort(dim=-1, descending=True, stable=True).indices)
    rank = torch.arange(tokens.shape[-1], dtype=torch.float32, device=scores.device)
    head = first_head + torch.arange(scores.shape[1], dtype=torch.float32, device=scores.device)
    score = (k * heads - rank * heads - head[:, None]) * listed
    merged = scores.new_zeros(scores.shape[0], scores.shape[-1])
    return merged.scatter_reduce_(-1, in_order.flatten(1), score.flatten(1), "amax")
