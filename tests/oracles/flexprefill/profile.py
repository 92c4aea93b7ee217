"""Steps 5 and 7 to 9: counts against gamma, head switch, forced entries and top-k."""

from __future__ import annotations

import math

import numpy as np

from oracles.flexprefill.attention import pool_slash, pool_vertical, pooled_estimate, token_profiles
from oracles.flexprefill.call import TOKENS_PER_COUNTED_BLOCK, Call, HeadProfile


def _entropy_terms(p: np.ndarray, other: np.ndarray, zero_is_nan: bool) -> float:
    """Sum of p ln(p/m) with m = (p + other) / 2. Literal (p = 0 gives NaN) or with 0 ln 0 = 0."""
    total = 0.0
    for x, y in zip(p.tolist(), other.tolist(), strict=True):
        if x == 0.0:
            total += math.nan if zero_is_nan else 0.0
        else:
            total += x * math.log(2 * x / (x + y))
    return total


def _js_distance(call: Call, abar: np.ndarray, vert_blk: np.ndarray) -> float:
    """Step 7: sqrt of the Jensen-Shannon divergence in nats; a sum rounded below its true minimum 0 counts as 0."""
    nan = not call.coverage
    js = 0.5 * _entropy_terms(abar, vert_blk, nan) + 0.5 * _entropy_terms(vert_blk, abar, nan)
    if js < 0.0:
        js = 0.0
    return math.sqrt(js)  # NaN stays NaN


def ranking(scores: np.ndarray) -> np.ndarray:
    """Indices by descending score, ties by ascending index."""
    return np.argsort(-scores, kind="stable")


def cumulative(scores: np.ndarray, forced: bool = False) -> np.ndarray:
    """Running sums of the scores taken in descending order; a forced index 0 is taken first."""
    return np.cumsum(scores[ranking(_forced(scores) if forced else scores)])


def reference_count(tokens: np.ndarray, gamma: float) -> int:
    """Step 5: c // 128 + 1 with c = 1 + #{cumulative <= gamma}, over TOKENS, before the budgets."""
    c = 1
    for total in cumulative(tokens):
        if total <= gamma:
            c += 1
    return c // TOKENS_PER_COUNTED_BLOCK + 1


def coverage_count(masses: np.ndarray, gamma: float, forced: bool) -> int:
    """Smallest number of top entries whose sum reaches gamma; all of them if rounding keeps it from doing so."""
    for taken, total in enumerate(cumulative(masses, forced), start=1):
        if total >= gamma:
            return taken
    return len(masses)


def _within_budget(call: Call, count: int) -> int:
    """Steps 1 and 5: raise to the minimum, then cap (the cap wins), never more than N."""
    return min(max(count, call.min_blocks), call.cap, call.num_blocks)


def _query_aware_count(call: Call) -> int:
    """Step 7: n_v = n_s = minb; capped in coverage mode only (the published code sets it after its capping)."""
    return call.floor if call.coverage else min(call.min_blocks, call.num_blocks)


def _raw_count(call: Call, tokens: np.ndarray, masses: np.ndarray) -> int:
    """Number of blocks that gamma asks for, before the budgets."""
    if call.coverage:
        return coverage_count(masses, call.settings.gamma, forced=True)
    return reference_count(tokens, call.settings.gamma)


def _forced(masses: np.ndarray) -> np.ndarray:
    """Step 8: index 0 (key block 0, slash distance 0) scores +inf and counts against the budget."""
    scores = masses.copy()
    scores[0] = np.inf
    return scores


def _top(masses: np.ndarray, count: int) -> tuple[int, ...]:
    """Step 9: the ``count`` best indices with index 0 forced, ascending."""
    return tuple(sorted(int(j) for j in ranking(_forced(masses))[:count]))


def _diagonals(call: Call, buckets: tuple[int, ...]) -> tuple[int, ...]:
    """Step 10: block diagonals of the chosen slash buckets: s (reference), s and s+1 (coverage)."""
    found: set[int] = set()
    for s in buckets:
        found.add(s)
        if call.coverage and s + 1 < call.num_blocks:
            found.add(s + 1)
    return tuple(sorted(found))


def head_profile(call: Call, queries: np.ndarray, keys: np.ndarray) -> HeadProfile:
    """Steps 2-9 for one head."""
    vert, slash = token_profiles(call, queries, keys)
    vert_blk = pool_vertical(call, vert)
    slash_blk = pool_slash(call, slash)
    abar = pooled_estimate(call, queries, keys)
    distance = _js_distance(call, abar, vert_blk)
    query_aware = distance < call.settings.tau  # NaN compares false: vertical-slash
    if query_aware:
        n_v = n_s = _query_aware_count(call)
    else:
        n_v = _within_budget(call, _raw_count(call, vert, vert_blk))
        n_s = _within_budget(call, _raw_count(call, slash, slash_blk))
    return HeadProfile(
        vert=vert,
        slash=slash,
        vert_blk=vert_blk,
        slash_blk=slash_blk,
        abar=abar,
        js_distance=distance,
        query_aware=query_aware,
        n_v=n_v,
        n_s=n_s,
        verticals=_top(vert_blk, n_v),
        diagonals=_diagonals(call, _top(slash_blk, n_s)),
    )
