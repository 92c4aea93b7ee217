"""Slow float64 oracle for the block selection of XAttention: plain loops over groups, written from the specification.

One unpadded sequence; the queries are the last ``Sq`` of ``n`` tokens. ``a`` and ``c`` are absolute groups of
``stride`` tokens for queries and keys, ``I`` and ``J`` absolute blocks, ``i = I - q_start // block`` the row of this
call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class XAttentionSettings:
    threshold: float
    stride: int
    block_size: int


@dataclass(frozen=True)
class Selection:
    """What the oracle found, per head and query block."""

    blocks: np.ndarray  # bool [Hq, NQ, N]
    masses: np.ndarray  # float64 [Hq, NQ, N], sums of 1
    margins: np.ndarray  # float64 [Hq, NQ]: how near a decision was to its threshold, inf where there was none


def xattention_selection(
    q: np.ndarray, k: np.ndarray, scale: float, settings: XAttentionSettings, softcap: float | None = None
) -> Selection:
    """The selection for q [Hq, Sq, D] (the last Sq positions) and k [Hkv, n, D]."""
    heads, queries, _ = q.shape
    n, block = k.shape[1], settings.block_size
    first_row, last_row = (n - queries) // block, (n - 1) // block
    shape = (heads, last_row - first_row + 1, last_row + 1)
    masses, blocks, margins = np.zeros(shape), np.zeros(shape, dtype=bool), np.full(shape[:2], np.inf)
    for h in range(heads):
        keys = k[h // (heads // k.shape[0])]
        for i in range(shape[1]):
            masses[h, i] = _block_row(q[h], keys, first_row + i, shape[2], scale, settings, softcap)
            chosen, margins[h, i] = _choose(masses[h, i], first_row + i, settings.threshold)
            blocks[h, i, list(chosen)] = True
    return Selection(blocks, masses, margins)


def _block_row(
    q: np.ndarray,
    k: np.ndarray,
    query_block: int,
    num_blocks: int,
    scale: float,
    settings: XAttentionSettings,
    softcap: float | None,
) -> np.ndarray:
    """Mass of every key block for one query block [N], averaged over its groups that hold a query of the call."""
    per_block = settings.block_size // settings.stride
    mass = np.zeros(num_blocks)
    groups = 0
    for a in range(query_block * per_block, (query_block + 1) * per_block):
        logits = [_tile_logit(q, k, a, c, scale, settings.stride, softcap) for c in range(a + 1)]
        if logits[0] is None:
            continue
        groups += 1
        largest = max(logits)
        weights = [math.exp(logit - largest) for logit in logits]
        for c, weight in enumerate(weights):
            mass[c // per_block] += weight / sum(weights)
    return mass / groups


def _tile_logit(
    q: np.ndarray, k: np.ndarray, a: int, c: int, scale: float, stride: int, softcap: float | None
) -> float | None:
    """Mean logit on the antidiagonal of tile (a, c) over the real queries of a; None if it has none.

    A key that does not exist is a zero vector.
    """
    q_start = k.shape[0] - q.shape[0]
    total, real = 0.0, 0
    for t in range(stride):
        query, key = a * stride + stride - 1 - t, c * stride + t
        if not q_start <= query < k.shape[0]:
            continue
        real += 1
        if key < k.shape[0]:
            total += float(np.dot(q[query - q_start], k[key])) * scale
    if real == 0:
        return None
    mean = total / real
    return mean if softcap is None else softcap * math.tanh(mean / softcap)


def _choose(mass: np.ndarray, diagonal: int, threshold: float) -> tuple[set[int], float]:
    """Block 0 and the diagonal, then the largest blocks until the threshold is reached; and how near the choice was."""
    chosen = {0, diagonal}
    reached = sum(float(mass[j]) for j in chosen)
    margin = abs(reached - threshold)
    rest = sorted((j for j in range(diagonal) if j not in chosen), key=lambda j: (-mass[j], j))
    for rank, j in enumerate(rest):
        if reached >= threshold:
            last = mass[rest[rank - 1]] if rank else math.inf
            return chosen, min(margin, float(last - mass[j]))
        chosen.add(j)
        reached += float(mass[j])
        margin = min(margin, abs(reached - threshold))
    return chosen, math.inf if len(rest) == 0 else margin
