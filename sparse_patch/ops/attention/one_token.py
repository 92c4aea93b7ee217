"""Attention of one token by PyTorch's own kernel, for CPUs: it reads each key once and keeps no logits."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_patch.call import AttentionCall


def serves(call: AttentionCall) -> bool:
    """Whether the kernel serves a call, if all keys that it is given are real."""
    return call.q.shape[2] == 1 and call.softcap is None and call.k.shape[3] == call.v.shape[3]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    """The output `[B, Hq, 1, D]`. The query heads of a group are handed over as the queries of one head.

    Args:
        q: `[B, Hq, 1, D]`.
        k: `[B, groups, T, D]` with T > 0; groups are KV heads, or query heads if each has keys of its own.
        v: `[B, groups, T, D]`.
        scale: factor on the logits.
        hidden: bool `[B or 1, L, T]`, keys that are not read: one list for all heads, or one for each group or query
            head. None if all are read. A list must not hide all keys. Values that are not read must be finite.
    """
    batch, heads, _, head_dim = q.shape
    groups, mask = k.shape[1], None
    if hidden is not None:
        mask = ~hidden.view(hidden.shape[0], min(hidden.shape[1], groups), -1, hidden.shape[2])
    out = scaled_dot_product_attention(q.reshape(batch, groups, -1, head_dim), k, v, mask, scale=scale)
    return out.reshape(batch, heads, 1, -1)
