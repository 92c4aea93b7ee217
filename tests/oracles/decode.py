"""Slow float64 oracles of the decode methods, plain loops written from the papers' specification.

One row without padding: `q` `[Hq, D]` is the query of the current token, the last of the `n` keys `k` `[Hkv, n, D]`.
Each oracle returns the tokens (or pages) of every list, and a margin: how near, relatively, any decision was to its
opposite.
"""

from __future__ import annotations

import math

import numpy as np

Lists = list[set[int]]


def logits_of(q: np.ndarray, k: np.ndarray, scale: float, softcap: float | None = None) -> np.ndarray:
    """Logits of every query head, float64 `[Hq, n]`."""
    group = len(q) // len(k)
    z = np.stack([k[head // group].astype(float) @ q[head].astype(float) * scale for head in range(len(q))])
    return z if softcap is None else softcap * np.tanh(z / softcap)


def probabilities_of(z: np.ndarray) -> np.ndarray:
    weights = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def tidaldecode(z: np.ndarray, kv_heads: int, budget: int, force_current: bool, sharing: str) -> tuple[Lists, float]:
    """Top-k tokens per query head by logits, or per group or for all heads by the highest probability."""
    n = z.shape[1]
    if sharing == "q_head":
        scores = list(z)
    else:
        parts = np.split(probabilities_of(z), kv_heads if sharing == "kv_group" else 1)
        scores = [np.array([max(part[:, t]) for t in range(n)]) for part in parts]
    forced = {n - 1} if force_current else set()
    return _top_of_each(scores, budget, [forced] * len(scores))


def delta(
    z: np.ndarray, page_size: int, num_pages: int, recency_pages: int, position_bias: float
) -> tuple[Lists, float]:
    """Pages by the sum over tokens of the maximum probability over all heads; the last pages are forced."""
    probability = probabilities_of(z)
    n = z.shape[1]
    have = math.ceil(n / page_size)
    scores = []
    for page in range(have):
        tokens = range(page * page_size, min((page + 1) * page_size, n))
        scores.append(sum(max(probability[:, t]) for t in tokens) - position_bias * page)
    forced = set(range(max(have - recency_pages, 0), have))
    return _top_of_each([np.array(scores)], num_pages, [forced])


def lessismore(z: np.ndarray, budget: int, recency: float, sinks: int) -> tuple[Lists, float]:
    """The last tokens, the first tokens, then the heads' rankings merged rank by rank."""
    heads, n = z.shape
    if n <= budget:
        return [set(range(n))], math.inf
    recent = math.ceil(recency * budget)
    chosen = {*range(min(sinks, n)), *range(n - recent, n)}
    rankings = [sorted(range(n - recent), key=lambda t, h=head: (-z[h, t], t)) for head in range(heads)]
    margin = math.inf
    for rank in range(n - recent):
        for ranking in rankings:
            if len(chosen) == budget:
                return [chosen], margin
            chosen.add(ranking[rank])
        for head, ranking in enumerate(rankings):
            if rank + 1 < n - recent:
                margin = min(margin, z[head, ranking[rank]] - z[head, ranking[rank + 1]])
    return [chosen], margin


def quest_bounds(q: np.ndarray, k: np.ndarray, page_size: int) -> np.ndarray:
    """Upper bound of `q @ key` in every page, float64 `[Hq, pages]`."""
    group, n = len(q) // len(k), k.shape[1]
    bounds = np.zeros((len(q), math.ceil(n / page_size)))
    for head in range(len(q)):
        for page in range(bounds.shape[1]):
            keys = k[head // group, page * page_size : (page + 1) * page_size].astype(float)
            for d in range(q.shape[1]):
                bounds[head, page] += max(q[head, d] * keys[:, d].max(), q[head, d] * keys[:, d].min())
    return bounds


def quest(
    q: np.ndarray, k: np.ndarray, page_size: int, num_pages: int, current_page: str, group_score: str | None
) -> tuple[Lists, float]:
    """Pages with the highest bounds; `group_score` None gives one list per query head."""
    scores = list(quest_bounds(q, k, page_size))
    if group_score is not None:
        group = len(q) // len(k)
        of_groups = [np.stack(scores[i * group : (i + 1) * group]) for i in range(len(k))]
        scores = [part.sum(0) if group_score == "sum" else part.max(0) for part in of_groups]
    last = len(scores[0]) - 1
    if current_page == "added":  # the others first, then the page of the current token on top
        lists, margin = _top_of_each([score[:last] for score in scores], num_pages, [set()] * len(scores))
        return [pages | {last} for pages in lists], margin
    forced = {last} if current_page == "forced" else set()
    return _top_of_each(scores, num_pages, [forced] * len(scores))


def kinetics(
    z: np.ndarray, kv_heads: int, block_size: int, num_blocks: int, sinks: int, local: int
) -> tuple[Lists, float]:
    """Tokens of each KV head: sinks, blocks with the highest mean logit, and the window that remains after them."""
    heads, n = z.shape
    dynamic = max((n - local - sinks) // block_size, 0) * block_size
    group = heads // kv_heads
    lists, margins = [], []
    for head in range(kv_heads):
        mean = z[head * group : (head + 1) * group].mean(0)
        means = np.array([mean[sinks + b : sinks + b + block_size].mean() for b in range(0, dynamic, block_size)])
        (blocks,), margin = _top_of_each([means], num_blocks, [set()])
        tokens = {sinks + block * block_size + i for block in blocks for i in range(block_size)}
        lists.append({*range(min(sinks, n)), *tokens, *range(sinks + dynamic, n)})
        margins.append(margin)
    return lists, min(margins)


def _top_of_each(scores: list[np.ndarray], number: int, forced: Lists) -> tuple[Lists, float]:
    """The `number` largest of each array: forced ones before all others, and of equal ones the first."""
    lists, margin = [], math.inf
    for values, always in zip(scores, forced, strict=True):
        order = sorted(range(len(values)), key=lambda i, a=always, v=values: (i not in a, -v[i], i))
        lists.append(set(order[:number]))
        if len(always) < number < len(order):
            kept, left = values[order[number - 1]], values[order[number]]
            margin = min(margin, (kept - left) / max(abs(kept), abs(left), 1e-30))
    return lists, margin
