"""Slow float64 oracle for the block selection of FlexPrefill, written only from the specification.

It was written without sight of the implementation. There is one unpadded sequence; the queries are the last ``Sq`` of
``n`` tokens.

Steps: 0 dense shortcuts, 1 budgets in blocks, 2 representative queries, 3 their attention, 4 token profiles by key and
by distance, 5 counts against gamma, 6 pooling to blocks, 7 head switch, 8 forced entries, 9 top-k, 10 vertical-slash
set, 11 query-aware set.

Index conventions: ``o`` token distance (query position minus key position), ``s`` block distance (query block minus
key block), ``I`` absolute query block, ``i = I - q_start // B`` row of this call, ``J`` key block. Slash arrays are
always indexed by DISTANCE here (``slash[o]``, ``slash_blk[s]``); the spec's left-aligned index is ``t = n - 1 - o``.
"""

from __future__ import annotations

import numpy as np

from oracles.flexprefill.attention import pooled_attention
from oracles.flexprefill.blocks import check_forced, query_aware_blocks, vertical_slash_blocks
from oracles.flexprefill.call import FlexPrefillSettings, HeadProfile, causal_blocks, head_inputs, is_dense, make_call
from oracles.flexprefill.margins import query_aware_margins, switch_margin, vertical_slash_margin
from oracles.flexprefill.profile import head_profile


def flexprefill_blocks(
    q: np.ndarray,
    k: np.ndarray,
    scale: float,
    settings: FlexPrefillSettings,
    softcap: float | None = None,
) -> np.ndarray:
    """Selected blocks, bool [Hq, NQ, N], for q [Hq, Sq, D] (the last Sq positions) and k [Hkv, n, D]."""
    call = make_call(q, k, scale, settings, softcap)
    causal = causal_blocks(call)
    mask = np.zeros((q.shape[0], call.num_rows, call.num_blocks), dtype=bool)
    for h in range(q.shape[0]):
        if is_dense(call):
            mask[h] = causal
            continue
        queries, keys = head_inputs(q, k, h)
        profile = head_profile(call, queries, keys)
        mask[h] = vertical_slash_blocks(call, profile)
        if profile.query_aware:
            mask[h] |= query_aware_blocks(call, pooled_attention(call, queries, keys))
        mask[h] &= causal
        check_forced(call, mask[h])
    return mask


def flexprefill_profile(
    q: np.ndarray,
    k: np.ndarray,
    scale: float,
    settings: FlexPrefillSettings,
    softcap: float | None = None,
) -> list[HeadProfile]:
    """Intermediate results per query head; an empty list when the call takes the dense shortcut."""
    call = make_call(q, k, scale, settings, softcap)
    if is_dense(call):
        return []
    return [head_profile(call, *head_inputs(q, k, h)) for h in range(q.shape[0])]


def boundary_margins(
    q: np.ndarray,
    k: np.ndarray,
    scale: float,
    settings: FlexPrefillSettings,
    softcap: float | None = None,
) -> np.ndarray:
    """Smallest relative distance to a threshold of any decision that reaches row i of head h, float64 [Hq, NQ].

    inf if nothing was decided (dense shortcut); 0 if the decision rests on a tie or on float32 underflow.
    An exact tie of two zero masses is no risk (they are zero in every precision): the fixed tie rule decides it.
    """
    call = make_call(q, k, scale, settings, softcap)
    margins = np.full((q.shape[0], call.num_rows), np.inf)
    if is_dense(call):
        return margins
    for h in range(q.shape[0]):
        queries, keys = head_inputs(q, k, h)
        profile = head_profile(call, queries, keys)
        margins[h] = min(switch_margin(call, profile), vertical_slash_margin(call, profile))
        if profile.query_aware:
            attention = pooled_attention(call, queries, keys)
            margins[h] = np.minimum(margins[h], query_aware_margins(call, attention))
    return margins


def boundary_margin(
    q: np.ndarray,
    k: np.ndarray,
    scale: float,
    settings: FlexPrefillSettings,
    softcap: float | None = None,
) -> float:
    """Smallest of ``boundary_margins``: skip an exact comparison when it is below about 1e-5."""
    return float(np.min(boundary_margins(q, k, scale, settings, softcap)))
