"""Slow oracle for the selection of SALE: plain loops over tiles, rows and blocks, written only from the specification.

One unpadded sequence; the queries are the last ``Sq`` of ``n`` tokens, and q and k have the model's dtype. ``m`` is an
absolute tile of 64 queries, ``i = m - q_start // 64`` its row of this call, ``b`` an absolute block of 32 keys. Exact
numbers are float64; the published int4 arithmetic rounds to the model's dtype where the specification does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SaleSettings:
    numerics: str  # "int4", "int8", or "exact" for scores that are not quantised
    local_window: int = 128


@dataclass(frozen=True)
class Codes:
    """Quantised rows."""

    codes: np.ndarray  # int64 [n, D]
    scales: np.ndarray  # [n], a scale for each row
    ties: np.ndarray  # float64 [n, D]: how far a value lies from where its code changes, in codes


@dataclass(frozen=True)
class Selection:
    """What the oracle found, per head and query tile."""

    kept: np.ndarray  # bool [Hq, NQ, blocks]
    forced: np.ndarray  # bool [NQ, blocks]: sink and local blocks
    margins: np.ndarray  # float64 [Hq, NQ, blocks], in logits: how near the decision was; inf where there was none
    limits: np.ndarray  # float64 [Hq, Sq]: what an estimated product must exceed
    keys: list[Codes]  # one for each KV head
    queries: list[Codes]  # one for each query head


def sale_selection(
    q: np.ndarray, k: np.ndarray, scale: float, tau: list[float], settings: SaleSettings, softcap: float | None = None
) -> Selection:
    """The selection for q [Hq, Sq, D] (the last Sq positions) and k [Hkv, n, D]."""
    heads, queries, _ = q.shape
    n = k.shape[1]
    q_start = n - queries
    first, last = q_start // 64, (n - 1) // 64
    shape = (heads, last - first + 1, math.ceil(n / 32))
    kept, margins = np.zeros(shape, dtype=bool), np.full(shape, np.inf)
    forced = np.zeros(shape[1:], dtype=bool)
    limits = np.zeros((heads, queries))
    all_keys, all_queries = [], []
    for h in range(heads):
        keys = k[h // (heads // k.shape[0])]
        mean_k = keys.astype(np.float64).mean(0).astype(k.dtype)
        smooth_k = keys - mean_k
        mean_q = q[h].astype(np.float64).mean(0).astype(q.dtype)
        codes_k = _quantise_keys(smooth_k, settings)
        codes_q = _quantise_queries(q[h], mean_q, q_start, settings)
        all_keys.append(codes_k), all_queries.append(codes_q)
        for i in range(shape[1]):
            m = first + i
            blocks, local = regions(n, m, settings.local_window)
            if tau[h] < 1e-5:
                local = 1
            forced[i, [0, *range(local, blocks)]] = True
            kept[h, i, [0, *range(local, blocks)]] = True
            for row in range(max(64 * m, q_start), min(64 * m + 64, n)):
                limit = _limit(q[h, row - q_start], smooth_k, mean_k, row, local, scale, tau[h], softcap)
                limits[h, row - q_start] = limit
                for b in range(1, local):
                    score, over = _score(
                        q[h, row - q_start], smooth_k, mean_q, codes_q, codes_k, row - q_start, b, limit, settings
                    )
                    before = bool(kept[h, i, b])
                    kept[h, i, b] |= over
                    margins[h, i, b] = _margin(float(margins[h, i, b]), before, over, abs(score - limit) * scale)
    return Selection(kept, forced, margins, limits, all_keys[:: heads // k.shape[0]], all_queries)


def regions(n: int, m: int, window: int, segment: int = 128) -> tuple[int, int]:
    """Causal blocks of tile m, and the first local block: Step 2 of the specification, with its way of counting."""
    visible = min(math.ceil(n / 32), math.ceil((m + 1) * 64 / 32))
    per_segment, wanted = segment // 32, window // 32
    without_sink = visible - 1
    segments = math.ceil(without_sink / per_segment)
    rest = without_sink - segments * per_segment
    extra = math.ceil((wanted - rest) / per_segment)
    number_local = per_segment * extra + rest
    if number_local >= visible:
        return visible, 1
    return visible, visible - number_local


def _limit(
    query: np.ndarray,
    smooth_k: np.ndarray,
    mean_k: np.ndarray,
    row: int,
    local: int,
    scale: float,
    tau: float,
    softcap: float | None,
) -> float:
    """Step 3's thr of one query, in raw smoothed units; with a softcap, for the uncapped logit."""
    reference = [j for j in range(row + 1) if j // 32 == 0 or j // 32 >= local]
    wide = query.astype(np.float64)
    offset = float(wide @ mean_k.astype(np.float64)) if softcap is not None else 0.0
    logits = (smooth_k[reference].astype(np.float64) @ wide + offset) * scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    largest = float(logits.max())
    total = float(np.exp(logits - largest).sum())
    if tau == 0:
        return -math.inf
    limit = largest + math.log(total * tau)
    if softcap is not None:
        ratio = limit / softcap
        limit = math.inf if ratio >= 1 else -math.inf if ratio <= -1 else softcap * math.atanh(ratio)
    return limit / scale - offset


def _score(
    query: np.ndarray,
    smooth_k: np.ndarray,
    mean_q: np.ndarray,
    codes_q: Codes,
    codes_k: Codes,
    i: int,
    block: int,
    limit: float,
    settings: SaleSettings,
) -> tuple[float, bool]:
    """The highest estimate of a query in a block, the nearest to a decision, and whether any is above the limit."""
    keys = np.arange(32 * block, 32 * block + 32)
    dtype = smooth_k.dtype.type
    if settings.numerics == "exact":
        score = float((smooth_k[keys].astype(np.float64) @ query.astype(np.float64)).max())
        return score, score > limit
    products = codes_k.codes[keys] @ codes_q.codes[i]
    if settings.numerics == "int8":
        score = int(products.max()) * float(codes_k.scales[keys[0]]) * float(codes_q.scales[i])
        return score, score > limit
    means = smooth_k[keys].astype(np.float64) @ mean_q.astype(np.float64)
    best, over = -math.inf, False
    for lane in range(4):
        own = keys % 8 // 2 == lane
        sk, sq = codes_k.scales[keys[own][0]], codes_q.scales[i]
        term = (means[own] / float(sk)).astype(dtype)
        whole = products[own] + np.rint(term.astype(np.float32) / np.float32(sq)).astype(np.int64)
        with np.errstate(over="ignore"):
            estimate = dtype(whole.max()) * (sq * sk)
            over = over or bool(estimate > dtype(limit))
        best = max(best, float(estimate))
    return best, over


def _margin(known: float, before: bool, over: bool, distance: float) -> float:
    """How near a block is to the other decision: the clearest row that keeps it, else the nearest of all rows."""
    if over:
        return max(known, distance) if before else distance
    return known if before else min(known, distance)


def _quantise_keys(smooth_k: np.ndarray, settings: SaleSettings) -> Codes:
    groups: dict[tuple[int, int], list[int]] = {}
    for j in range(smooth_k.shape[0]):
        lane = j % 32 % 8 // 2 if settings.numerics == "int4" else 0
        groups.setdefault((j // 32, lane), []).append(j)
    return _quantise(smooth_k, list(groups.values()), settings)


def _quantise_queries(q: np.ndarray, mean_q: np.ndarray, q_start: int, settings: SaleSettings) -> Codes:
    if settings.numerics != "int4":
        return _quantise(q, [[i] for i in range(q.shape[0])], settings)
    groups: dict[tuple[int, int], list[int]] = {}
    for i in range(q.shape[0]):
        groups.setdefault(((q_start + i) // 16, (q_start + i) % 8), []).append(i)
    return _quantise(q - mean_q, list(groups.values()), settings)


def _quantise(x: np.ndarray, groups: list[list[int]], settings: SaleSettings) -> Codes:
    largest = 7 if settings.numerics == "int4" else 127
    dtype = x.dtype.type if settings.numerics == "int4" else np.float32
    codes, scales = np.zeros(x.shape, dtype=np.int64), np.zeros(x.shape[0], dtype=dtype)
    ties = np.zeros(x.shape)
    for group in groups:
        scale = dtype(np.abs(x[group]).max().astype(np.float32) / np.float32(largest))
        scales[group] = scale if scale > 0 else 1
        values = x[group].astype(np.float64) / float(scales[group[0]])
        codes[group] = np.clip(np.rint(values), -largest, largest)
        ties[group] = np.abs(np.abs(values - np.floor(values)) - 0.5)
    return Codes(codes, scales, ties)
