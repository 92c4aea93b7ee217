"""Steps 2 to 4 and 6: representative queries, their attention, token profiles and pooling to blocks."""

from __future__ import annotations

import numpy as np

from oracles.flexprefill.call import Call


def _logits(call: Call, query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Scaled (and soft-capped) logits of one query vector against keys [m, D]."""
    x = keys @ query * call.scale
    if call.softcap is not None:
        x = call.softcap * np.tanh(x / call.softcap)
    return x


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def _pooled_keys(call: Call, keys: np.ndarray) -> np.ndarray:
    """Step 7: kbar_J, the mean over the real keys of block J, [N, D]."""
    return np.stack([np.mean(keys[j * call.block : (j + 1) * call.block], axis=0) for j in range(call.num_blocks)])


def token_profiles(call: Call, queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps 2-4: exact attention of the last B positions -> (vert[j], slash[o]), each of total mass 1."""
    vert = np.zeros(call.n)
    slash = np.zeros(call.n)
    for position in range(call.n - call.block, call.n):
        visible = position + 1  # keys 0..position
        p = _softmax(_logits(call, queries[position - call.q_start], keys[:visible]))
        vert[:visible] += p / call.block
        slash[:visible] += p[::-1] / call.block  # key j = position - o, so o = 0 is the last visible key
    return vert, slash


def pooled_estimate(call: Call, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Step 7: abar, the softmax of the mean representative query over all pooled keys, [N]."""
    qbar = np.mean(queries[call.num_queries - call.block :], axis=0)
    return _softmax(_logits(call, qbar, _pooled_keys(call, keys)))


def pooled_attention(call: Call, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Step 11: a[i, J], softmax over J <= I of pooled query against pooled keys, 0 above the diagonal, [NQ, N]."""
    kbar = _pooled_keys(call, keys)
    attention = np.zeros((call.num_rows, call.num_blocks))
    for i in range(call.num_rows):
        block = call.first_row + i
        begin = max(block * call.block, call.q_start)  # positions of this block that this call has queries for
        end = min((block + 1) * call.block, call.n)
        qbar = np.mean(queries[begin - call.q_start : end - call.q_start], axis=0)
        attention[i, : block + 1] = _softmax(_logits(call, qbar, kbar[: block + 1]))
    return attention


def pool_vertical(call: Call, vert: np.ndarray) -> np.ndarray:
    """Step 6: mass of each key block."""
    return np.array([np.sum(vert[j * call.block : (j + 1) * call.block]) for j in range(call.num_blocks)])


def pool_slash(call: Call, slash: np.ndarray) -> np.ndarray:
    """Mass of each slash bucket by block distance s.

    Reference (step 6): bucket b = N-1-s holds t = bB .. bB+B-1 of t = n-1-o (left-aligned, short at the right end).
    Coverage: bucket s holds the distances o = sB .. sB+B-1.
    """
    pooled = np.zeros(call.num_blocks)
    for o in range(call.n):
        if call.coverage:
            s = o // call.block
        else:
            t = call.n - 1 - o
            s = call.num_blocks - 1 - t // call.block
        pooled[s] += slash[o]
    return pooled
