"""Slow float64 oracle for the block selection of InfLLM-V2: plain loops over tokens, written from the specification.

One unpadded sequence; the queries are the last ``Sq`` of ``n`` tokens. A compressed key is the mean of all keys of its
window, taken at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 64


@dataclass(frozen=True)
class InfLLMSettings:
    topk: int
    init_blocks: int
    window_size: int
    min_length: int


@dataclass(frozen=True)
class Selection:
    """What the oracle found, per KV head and query of the call."""

    blocks: np.ndarray  # bool [Hkv, Sq, N]
    margins: np.ndarray  # float64 [Hkv, Sq]: last score that was chosen by the first that was not; inf without a choice


def compressed(k: np.ndarray, size: int, stride: int) -> np.ndarray:
    """Means [n, D] of whole windows of the keys [tokens, D]."""
    windows = [k[begin : begin + size].mean(0) for begin in range(0, len(k) - size + 1, stride)]
    return np.array(windows).reshape(len(windows), k.shape[1])


def block_scores(
    q: np.ndarray, k: np.ndarray, position: int, scale: float, softcap: float | None = None
) -> dict[int, float]:
    """Scores of one KV head's blocks for the queries [G, D] of the token at a position; the token sees keys [n, D]."""
    k = k[: position + 1]
    fine, coarse = compressed(k, 32, 16), compressed(k, 128, 64)
    total = np.zeros(len(fine))
    for head in q:
        z_fine, z_coarse = scale * fine @ head, scale * coarse @ head
        if softcap is not None:
            z_fine, z_coarse = (softcap * np.tanh(z / softcap) for z in (z_fine, z_coarse))
        if len(z_coarse):
            total += np.exp(z_fine - np.logaddexp.reduce(z_coarse))
    scores: dict[int, float] = {}
    for column, weight in enumerate(total):
        for block in {16 * column // BLOCK, (16 * column + 31) // BLOCK}:  # the blocks that its window has tokens of
            scores[block] = max(scores.get(block, 0.0), weight)
    return scores


def infllm_selection(
    q: np.ndarray, k: np.ndarray, scale: float, settings: InfLLMSettings, softcap: float | None = None
) -> Selection:
    """The selection for q [Hq, Sq, D] (the last Sq positions) and k [Hkv, n, D]."""
    (heads, queries, _), (kv_heads, n, _) = q.shape, k.shape
    blocks = np.zeros((kv_heads, queries, -(-n // BLOCK)), dtype=bool)
    margins = np.full((kv_heads, queries), np.inf)
    group, local = heads // kv_heads, settings.window_size // BLOCK
    dense = -(-settings.min_length // BLOCK)
    for h in range(kv_heads):
        for i in range(queries):
            position = n - queries + i
            own = position // BLOCK
            always = {b for b in range(own + 1) if b < settings.init_blocks or b >= own - local or own < dense}
            left = settings.topk + local - len(always)
            others = [b for b in range(own + 1) if b not in always]
            if others:
                scores = block_scores(q[h * group : (h + 1) * group, i], k[h], position, scale, softcap)
                others.sort(key=lambda b: (-scores[b], b))
                if len(others) > left:
                    margins[h, i] = scores[others[left - 1]] / scores[others[left]]
            blocks[h, i, [*always, *others[:left]]] = True
    return Selection(blocks, margins)
