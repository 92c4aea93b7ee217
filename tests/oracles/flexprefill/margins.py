"""How near every decision of a call is to its threshold."""

from __future__ import annotations

import math

import numpy as np

from oracles.flexprefill.blocks import flat_cover
from oracles.flexprefill.call import FLOAT32_ZERO_RISK, TOKENS_PER_COUNTED_BLOCK, Call, HeadProfile
from oracles.flexprefill.profile import coverage_count, cumulative, ranking, reference_count


def _relative(value: float, threshold: float) -> float:
    return abs(value - threshold) / abs(threshold) if threshold != 0 else abs(value)


def _rank_gap(scores: np.ndarray, count: int, forced: bool) -> float:
    """Relative gap between the last chosen and the first unchosen score; a forced index 0 is no choice."""
    free = scores[1:] if forced else scores
    taken = count - 1 if forced else count
    if taken <= 0 or taken >= len(free):
        return math.inf
    ordered = free[ranking(free)]
    last, first_out = float(ordered[taken - 1]), float(ordered[taken])
    if last == 0.0:
        return math.inf  # both are exact zeros: the tie rule decides, in every precision
    if last < FLOAT32_ZERO_RISK:
        return 0.0
    return (last - first_out) / last


def _changed_counts(raw: int, low: int, high: int) -> tuple[int | None, int | None]:
    """Nearest raw counts below and above ``raw`` that change min(max(raw, low), high); None if there is none."""
    down = min(raw, high) - 1
    up = max(raw, low) + 1
    return (down if down >= low else None), (up if up <= high else None)


def _coverage_count_margin(masses: np.ndarray, gamma: float, low: int, high: int, forced: bool) -> float:
    """Distance of the running sums from gamma, if crossing it would change the clamped ``coverage_count``."""
    sums = cumulative(masses, forced)
    down, up = _changed_counts(coverage_count(masses, gamma, forced), low, high)
    margin = math.inf
    if down is not None:  # the count is at most ``down`` iff the first ``down`` entries reach gamma
        margin = min(margin, _relative(sums[down - 1], gamma))
    if up is not None:  # the count is at least ``up`` iff the first ``up - 1`` entries do not
        margin = min(margin, _relative(sums[up - 2], gamma))
    return margin


def _reference_count_margin(tokens: np.ndarray, gamma: float, low: int, high: int) -> float:
    """Distance of the running sums from gamma, if crossing it would change the clamped ``reference_count``.

    c // 128 + 1 >= x iff c >= 128 (x - 1) iff the first 128 (x - 1) - 1 tokens sum to <= gamma.
    """
    sums = cumulative(tokens)
    down, up = _changed_counts(reference_count(tokens, gamma), low, high)
    margin = math.inf
    for least in (None if down is None else down + 1, up):
        if least is None:
            continue
        needed = TOKENS_PER_COUNTED_BLOCK * (least - 1) - 1
        if needed <= len(sums):  # with fewer tokens the step cannot be reached at all
            margin = min(margin, _relative(sums[needed - 1], gamma))
    return margin


def switch_margin(call: Call, profile: HeadProfile) -> float:
    """sqrt(JS) against tau; 0 if float32 underflow could turn a query-aware head to NaN (reference only)."""
    if call.settings.tau <= 0 or math.isnan(profile.js_distance):
        return math.inf
    smallest = min(np.min(profile.abar), np.min(profile.vert_blk))
    if not call.coverage and profile.query_aware and smallest < FLOAT32_ZERO_RISK:
        return 0.0
    return _relative(profile.js_distance, call.settings.tau)


def vertical_slash_margin(call: Call, profile: HeadProfile) -> float:
    """Counts against gamma (heads that have them) and the two top-k boundaries."""
    margin = min(
        _rank_gap(profile.vert_blk, profile.n_v, forced=True),
        _rank_gap(profile.slash_blk, profile.n_s, forced=True),
    )
    if profile.query_aware:
        return margin
    gamma = call.settings.gamma
    for tokens, masses in ((profile.vert, profile.vert_blk), (profile.slash, profile.slash_blk)):
        if call.coverage:
            margin = min(margin, _coverage_count_margin(masses, gamma, call.floor, call.cap, forced=True))
        else:
            margin = min(margin, _reference_count_margin(tokens, gamma, call.floor, call.cap))
    return margin


def query_aware_margins(call: Call, attention: np.ndarray) -> np.ndarray:
    """Margin of the query-aware cover per row [NQ]; the reference quota couples all rows."""
    if not call.coverage:
        return np.full(call.num_rows, _flat_cover_margin(call, attention))
    margins = np.full(call.num_rows, np.inf)
    for i in range(call.num_rows):
        visible = attention[i, : call.first_row + i + 1]
        high = min(call.cap, len(visible))
        count = min(coverage_count(visible, call.settings.gamma, forced=False), high)
        margins[i] = min(
            _rank_gap(visible, count, forced=False),
            _coverage_count_margin(visible, call.settings.gamma, 1, high, forced=False),
        )
    return margins


def _flat_cover_margin(call: Call, attention: np.ndarray) -> float:
    """Running sums next to the quota gamma * NQ, and the gap between the last kept and first dropped entry."""
    flat = attention.reshape(-1)
    sums = cumulative(flat)
    quota = call.settings.gamma * call.num_rows
    kept = int(np.sum(flat_cover(call, attention)))
    margin = _rank_gap(flat, kept, forced=False)
    if kept > 0:
        margin = min(margin, _relative(sums[kept - 1], quota))
    if kept < len(sums):
        margin = min(margin, _relative(sums[kept], quota))
    return margin
