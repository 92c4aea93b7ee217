"""PyTorch backend of the profiles."""

import torch

from sparse_patch.call import AttentionCall, apply_softcap


def last_query_profiles(call: AttentionCall, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.last_queries`. One head at a time: all probabilities are 2 GB at 128k tokens and 32 heads."""
    hidden = torch.ones(queries, call.kv_length, dtype=torch.bool, device=call.q.device)
    hidden = hidden.triu(1 + call.kv_length - queries)  # the future
    if call.kv_start is not None:
        hidden = hidden | (torch.arange(call.kv_length, device=call.q.device) < call.kv_start[:, None])[:, None]
    profiles = [_head_profiles(call, head, hidden) for head in range(call.q.shape[1])]
    by_key, by_distance = (torch.stack(profile, 1) for profile in zip(*profiles, strict=True))
    return by_key, by_distance


def _head_profiles(call: AttentionCall, head: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`last_query_profiles` of one query head, `[B, Skv]` each; `hidden` `[B, block, Skv]` has the unseen keys."""
    q = call.q[:, head, -hidden.shape[-2] :].float() * call.scale
    logits = apply_softcap(q @ call.k[:, head // call.group_size].float().transpose(-1, -2), call.softcap)
    weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
    return weights.mean(-2), _diagonal_sums(weights).flip(-1) / q.shape[-2]


def _diagonal_sums(weights: torch.Tensor) -> torch.Tensor:
    """Sums `[B, n]` over the diagonals, farthest first, of the attention `[B, R, n]` of the last R of n queries.

    If each row is read one step further than the row before, the diagonals line up in columns, without a copy. Past a
    row's end this reads what lies above the previous row's diagonal, which is 0.
    """
    batch, rows, length = weights.shape
    stride = (rows * length, length + 1, 1)
    far = weights.as_strided((batch, rows - 1, rows - 1), stride, length - rows + 2)
    near = weights.as_strided((batch, rows, length - rows + 1), stride, 0)
    return torch.cat([far.sum(-2), near.sum(-2)], -1)
