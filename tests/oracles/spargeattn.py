"""Slow float64 oracle for the block selection of SpargeAttn: plain loops over blocks, written from the specification.

One unpadded sequence; the queries are the last ``Sq`` of ``n`` tokens. ``I`` and ``J`` are absolute blocks, ``i = I -
q_start // block`` is the row of this call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SpargeAttnSettings:
    topk: float | None  # a share of the blocks, or None for cdf_threshold
    cdf_threshold: float
    similarity_threshold: float
    attention_sink: bool
    block_size: int


@dataclass(frozen=True)
class Selection:
    """What the oracle found, per head and query block."""

    blocks: np.ndarray  # bool [Hq, NQ, N]
    alike_q: np.ndarray  # bool [Hq, NQ]
    alike_k: np.ndarray  # bool [Hq, N]
    margins: np.ndarray  # float64 [Hq, NQ]: how near a decision was to its threshold, inf where there was none


def spargeattn_selection(
    q: np.ndarray, k: np.ndarray, scale: float, settings: SpargeAttnSettings, softcap: float | None = None
) -> Selection:
    """The selection for q [Hq, Sq, D] (the last Sq positions) and k [Hkv, n, D]."""
    heads, queries, _ = q.shape
    n, block = k.shape[1], settings.block_size
    q_start = n - queries
    first_row, number = q_start // block, -(-n // block)
    shape = (heads, number - first_row, number)
    blocks, margins = np.zeros(shape, dtype=bool), np.full(shape[:2], np.inf)
    alike_q, alike_k = np.zeros(shape[:2], dtype=bool), np.zeros((heads, number), dtype=bool)
    for h in range(heads):
        keys = k[h // (heads // k.shape[0])]
        smoothed = keys - keys.mean(axis=0)
        of_keys = [_similarity(smoothed[J * block : (J + 1) * block]) for J in range(number)]
        alike_k[h] = [similarity > settings.similarity_threshold for similarity in of_keys]
        for i in range(shape[1]):
            diagonal = first_row + i
            always = {0, diagonal} if settings.attention_sink else {diagonal}
            mine = q[h, max(diagonal * block - q_start, 0) : (diagonal + 1) * block - q_start]
            similarity = _similarity(mine)
            alike_q[h, i] = similarity > settings.similarity_threshold
            decided = [similarity, *of_keys[: diagonal + 1]]
            margins[h, i] = min(abs(one - settings.similarity_threshold) for one in decided)
            logits = {}
            for J in range(diagonal + 1):
                if alike_k[h, J]:
                    logit = scale * float(mine.mean(axis=0) @ keys[J * block : (J + 1) * block].mean(axis=0))
                    logits[J] = logit if softcap is None else softcap * math.tanh(logit / softcap)
            chosen, margin = _choose(logits, number, settings)
            margins[h, i] = min(margins[h, i], margin)
            for J in range(diagonal + 1):
                blocks[h, i, J] = J in chosen | always or not (alike_q[h, i] and alike_k[h, J])
    return Selection(blocks, alike_q, alike_k, margins)


def _similarity(x: np.ndarray) -> float:
    """Mean cosine of all pairs of rows."""
    total = 0.0
    for a in x:
        for b in x:
            lengths = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
            total += float(a @ b) / lengths if lengths > 0 else 0.0
    return total / len(x) ** 2


def _choose(logits: dict[int, float], number: int, settings: SpargeAttnSettings) -> tuple[set[int], float]:
    """The selected candidates, the largest first, and how near the choice was."""
    order = sorted(logits, key=lambda J: (-logits[J], J))
    weights = [math.exp(logits[J] - logits[order[0]]) for J in order]
    margin, wanted = math.inf, 0
    if settings.topk is not None:
        wanted = int(settings.topk * number)
    else:
        reached = 0.0
        for weight in weights:
            reached += weight / sum(weights)
            margin = min(margin, abs(reached - settings.cdf_threshold))
            wanted += reached <= settings.cdf_threshold
    wanted = max(wanted, 1)
    if wanted < len(order):
        margin = min(margin, logits[order[wanted - 1]] - logits[order[wanted]])
    return set(order[:wanted]), margin
