"""Triton backend: one kernel quantises the keys, once per KV head, and one kernel decides."""

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.ops.selection.low_bit_scores.params import LowBitParams, TileBounds, mean_key, mean_query
from sparse_patch.ops.selection.low_bit_scores.triton.decide import decide_blocks
from sparse_patch.ops.selection.low_bit_scores.triton.keys import quantise_keys

__all__ = ["decide_blocks", "decisions", "quantise_keys"]


def decisions(call: AttentionCall, tau: torch.Tensor, rule: LowBitParams) -> torch.Tensor:
    """See `ops.selection.low_bit_scores`."""
    mean_k = mean_key(call)
    mean_q = mean_query(call) if rule.numerics == "int4" else None
    codes, scales, mean_term = quantise_keys(call.k, mean_k, mean_q, call.kv_start, rule.largest_code)
    bounds = TileBounds.of(call, rule)
    return decide_blocks(
        call.q, call.k, codes, scales, mean_term, mean_k, mean_q, tau, call.kv_start, call.scale, call.softcap or 0.0,
        call.q_start, rule.local_window, bounds.grid.num_query_blocks, bounds.num_words,
    )  # fmt: skip
