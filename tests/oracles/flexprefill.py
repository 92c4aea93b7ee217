"""Slow float64 oracle for the block selection of FlexPrefill, written from the specification alone.

Written without sight of the implementation. One unpadded sequence; the queries are the last ``Sq`` of ``n`` tokens.

Steps: 0 dense shortcuts, 1 budgets in blocks, 2 representative queries, 3 their attention, 4 token profiles by key and
by distance, 5 counts against gamma, 6 pooling to blocks, 7 head switch, 8 forced entries, 9 top-k, 10 vertical-slash
set, 11 query-aware set.

Index conventions: ``o`` token distance (query position minus key position), ``s`` block distance (query block minus
key block), ``I`` absolute query block, ``i = I - q_start // B`` row of this call, ``J`` key block. Slash arrays are
always indexed by DISTANCE here (``slash[o]``, ``slash_blk[s]``); the spec's left-aligned index is ``t = n - 1 - o``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

TOKENS_PER_COUNTED_BLOCK = 128  # step 5: literal divisor of the published code, whatever the block size is
FLOAT32_ZERO_RISK = 1e-30  # a probability between 0 and this may be an exact 0 in a float32 implementation


@dataclass(frozen=True)
class FlexPrefillSettings:
    """Hyper-parameters ; budgets in tokens; ``selection`` is "reference" or "coverage"."""

    gamma: float
    tau: float
    min_budget: int
    max_budget: int | None
    block_size: int
    selection: str


@dataclass(frozen=True)
class HeadProfile:
    """Intermediate results of one query head; block masses are the ones before forcing (step 8)."""

    vert: np.ndarray  # [n] step 4, by key position
    slash: np.ndarray  # [n] step 4, by token distance o
    vert_blk: np.ndarray  # [N] step 6, by key block J
    slash_blk: np.ndarray  # [N] step 6, by block distance s (reference: bucket b = N-1-s; coverage: bucket s)
    abar: np.ndarray  # [N] step 7, pooled estimate
    js_distance: float  # step 7, sqrt(JS); NaN where the reference formula gives NaN
    query_aware: bool
    n_v: int  # final number of vertical blocks
    n_s: int  # final number of slash buckets
    verticals: tuple[int, ...]  # chosen key blocks J, ascending
    diagonals: tuple[int, ...]  # block diagonals that the chosen slash buckets switch on, ascending


@dataclass(frozen=True)
class _Call:
    """Sizes and knobs of one call (notation of section 0.2)."""

    n: int
    num_queries: int
    num_blocks: int
    scale: float
    softcap: float | None
    settings: FlexPrefillSettings

    @property
    def block(self) -> int:
        return self.settings.block_size

    @property
    def q_start(self) -> int:
        return self.n - self.num_queries

    @property
    def first_row(self) -> int:
        return self.q_start // self.block

    @property
    def num_rows(self) -> int:
        return (self.n - 1) // self.block - self.first_row + 1

    @property
    def coverage(self) -> bool:
        return self.settings.selection == "coverage"

    @property
    def cap(self) -> int:
        """Most blocks that a budget allows: min(ceil(max_budget/B), N), at least one (step 1)."""
        if self.settings.max_budget is None:
            return self.num_blocks
        return min(max(1, _ceil_div(self.settings.max_budget, self.block)), self.num_blocks)

    @property
    def min_blocks(self) -> int:
        """Fewest blocks: ceil(min_budget/B), at least one (step 1), not yet capped."""
        return max(1, _ceil_div(self.settings.min_budget, self.block))

    @property
    def floor(self) -> int:
        """Fewest blocks after the cap, which wins over the minimum (step 5)."""
        return min(self.min_blocks, self.cap)


# ------------------------------------------------------------------------------------------------ public functions


def flexprefill_blocks(
    q: np.ndarray,
    k: np.ndarray,
    scale: float,
    settings: FlexPrefillSettings,
    softcap: float | None = None,
) -> np.ndarray:
    """Selected blocks, bool [Hq, NQ, N], for q [Hq, Sq, D] (the last Sq positions) and k [Hkv, n, D]."""
    call = _make_call(q, k, scale, settings, softcap)
    causal = _causal_blocks(call)
    mask = np.zeros((q.shape[0], call.num_rows, call.num_blocks), dtype=bool)
    for h in range(q.shape[0]):
        if _is_dense(call):
            mask[h] = causal
            continue
        queries, keys = _head_inputs(q, k, h)
        profile = _head_profile(call, queries, keys)
        mask[h] = _vertical_slash_blocks(call, profile)
        if profile.query_aware:
            mask[h] |= _query_aware_blocks(call, _pooled_attention(call, queries, keys))
        mask[h] &= causal
        _check_forced(call, mask[h])
    return mask


def flexprefill_profile(
    q: np.ndarray,
    k: np.ndarray,
    scale: float,
    settings: FlexPrefillSettings,
    softcap: float | None = None,
) -> list[HeadProfile]:
    """Intermediate results per query head; an empty list when the call takes the dense shortcut."""
    call = _make_call(q, k, scale, settings, softcap)
    if _is_dense(call):
        return []
    return [_head_profile(call, *_head_inputs(q, k, h)) for h in range(q.shape[0])]


def boundary_margins(
    q: np.ndarray,
    k: np.ndarray,
    scale: float,
    settings: FlexPrefillSettings,
    softcap: float | None = None,
) -> np.ndarray:
    """Smallest relative distance to a threshold of any decision that reaches row i of head h, float64 [Hq, NQ].

    inf where nothing was decided (dense shortcut); 0 where the decision rests on a tie or on float32 underflow.
    An exact tie of two zero masses is no risk (they are zero in every precision): the fixed tie rule decides it.
    """
    call = _make_call(q, k, scale, settings, softcap)
    margins = np.full((q.shape[0], call.num_rows), np.inf)
    if _is_dense(call):
        return margins
    for h in range(q.shape[0]):
        queries, keys = _head_inputs(q, k, h)
        profile = _head_profile(call, queries, keys)
        margins[h] = min(_switch_margin(call, profile), _vertical_slash_margin(call, profile))
        if profile.query_aware:
            attention = _pooled_attention(call, queries, keys)
            margins[h] = np.minimum(margins[h], _query_aware_margins(call, attention))
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


# ------------------------------------------------------------------------------------------------ call and shortcuts


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _make_call(
    q: np.ndarray, k: np.ndarray, scale: float, settings: FlexPrefillSettings, softcap: float | None
) -> _Call:
    """Check the shapes and settings, and collect the sizes."""
    if q.ndim != 3 or k.ndim != 3 or q.shape[2] != k.shape[2]:
        raise ValueError(f"want q [Hq, Sq, D] and k [Hkv, n, D], got {q.shape} and {k.shape}")
    if q.shape[0] % k.shape[0] != 0:
        raise ValueError(f"{q.shape[0]} query heads do not divide into {k.shape[0]} KV heads")
    if not 1 <= q.shape[1] <= k.shape[1]:
        raise ValueError(f"want 1 <= Sq <= n, got Sq={q.shape[1]}, n={k.shape[1]}")
    if settings.selection not in ("reference", "coverage"):
        raise ValueError(f"unknown selection {settings.selection!r}")
    n = k.shape[1]
    return _Call(n, q.shape[1], _ceil_div(n, settings.block_size), scale, softcap, settings)


def _is_dense(call: _Call) -> bool:
    """Step 0, plus gamma >= 1 (section 1.2: reference gamma = 1 is not dense by itself) and Sq <= B."""
    minimum = _ceil_div(call.settings.min_budget, call.block) * call.block
    return call.n <= max(2 * call.block, minimum) or call.settings.gamma >= 1 or call.num_queries <= call.block


def _causal_blocks(call: _Call) -> np.ndarray:
    """Every (row, key block) with J <= I, bool [NQ, N]."""
    mask = np.zeros((call.num_rows, call.num_blocks), dtype=bool)
    for i in range(call.num_rows):
        for j in range(call.first_row + i + 1):
            mask[i, j] = True
    return mask


def _check_forced(call: _Call, mask: np.ndarray) -> None:
    """Steps 8 and 10: key block 0 and the diagonal block of every row are on."""
    for i in range(call.num_rows):
        assert mask[i, 0], f"row {i}: key block 0 is off"
        assert mask[i, call.first_row + i], f"row {i}: the diagonal block is off"


def _head_inputs(q: np.ndarray, k: np.ndarray, h: int) -> tuple[np.ndarray, np.ndarray]:
    """Float64 queries [Sq, D] of head h and keys [n, D] of its KV head h // G (section 0.2)."""
    group = q.shape[0] // k.shape[0]
    return q[h].astype(np.float64), k[h // group].astype(np.float64)


# ------------------------------------------------------------------------------------------------ attention pieces


def _logits(call: _Call, query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Scaled (and soft-capped) logits of one query vector against keys [m, D]."""
    x = keys @ query * call.scale
    if call.softcap is not None:
        x = call.softcap * np.tanh(x / call.softcap)
    return x


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def _pooled_keys(call: _Call, keys: np.ndarray) -> np.ndarray:
    """Step 7: kbar_J, the mean over the keys that block J really has, [N, D]."""
    return np.stack([np.mean(keys[j * call.block : (j + 1) * call.block], axis=0) for j in range(call.num_blocks)])


def _token_profiles(call: _Call, queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps 2-4: exact attention of the last B positions -> (vert[j], slash[o]), each of total mass 1."""
    vert = np.zeros(call.n)
    slash = np.zeros(call.n)
    for position in range(call.n - call.block, call.n):
        visible = position + 1  # keys 0..position
        p = _softmax(_logits(call, queries[position - call.q_start], keys[:visible]))
        vert[:visible] += p / call.block
        slash[:visible] += p[::-1] / call.block  # key j = position - o, so o = 0 is the last visible key
    return vert, slash


def _pooled_estimate(call: _Call, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Step 7: abar, the softmax of the mean representative query over all pooled keys, [N]."""
    qbar = np.mean(queries[call.num_queries - call.block :], axis=0)
    return _softmax(_logits(call, qbar, _pooled_keys(call, keys)))


def _pooled_attention(call: _Call, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
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


# ------------------------------------------------------------------------------------------------ pooling to blocks


def _pool_vertical(call: _Call, vert: np.ndarray) -> np.ndarray:
    """Step 6: mass of each key block."""
    return np.array([np.sum(vert[j * call.block : (j + 1) * call.block]) for j in range(call.num_blocks)])


def _pool_slash(call: _Call, slash: np.ndarray) -> np.ndarray:
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


# ------------------------------------------------------------------------------------------------ head switch


def _entropy_terms(p: np.ndarray, other: np.ndarray, zero_is_nan: bool) -> float:
    """Sum of p ln(p/m) with m = (p + other) / 2. Literal (p = 0 gives NaN) or with 0 ln 0 = 0."""
    total = 0.0
    for x, y in zip(p.tolist(), other.tolist(), strict=True):
        if x == 0.0:
            total += math.nan if zero_is_nan else 0.0
        else:
            total += x * math.log(2 * x / (x + y))
    return total


def _js_distance(call: _Call, abar: np.ndarray, vert_blk: np.ndarray) -> float:
    """Step 7: sqrt of the Jensen-Shannon divergence in nats; a sum rounded below its true minimum 0 counts as 0."""
    nan = not call.coverage
    js = 0.5 * _entropy_terms(abar, vert_blk, nan) + 0.5 * _entropy_terms(vert_blk, abar, nan)
    if js < 0.0:
        js = 0.0
    return math.sqrt(js)  # NaN stays NaN


# ------------------------------------------------------------------------------------------------ budgets and top-k


def _ranking(scores: np.ndarray) -> np.ndarray:
    """Indices by descending score, ties by ascending index."""
    return np.argsort(-scores, kind="stable")


def _cumulative(scores: np.ndarray, forced: bool = False) -> np.ndarray:
    """Running sums of the scores taken in descending order; a forced index 0 is taken first."""
    return np.cumsum(scores[_ranking(_forced(scores) if forced else scores)])


def _reference_count(tokens: np.ndarray, gamma: float) -> int:
    """Step 5: c // 128 + 1 with c = 1 + #{cumulative <= gamma}, over TOKENS, before the budgets."""
    c = 1
    for total in _cumulative(tokens):
        if total <= gamma:
            c += 1
    return c // TOKENS_PER_COUNTED_BLOCK + 1


def _coverage_count(masses: np.ndarray, gamma: float, forced: bool) -> int:
    """Smallest number of top entries whose sum reaches gamma; all of them if rounding keeps it from doing so."""
    for taken, total in enumerate(_cumulative(masses, forced), start=1):
        if total >= gamma:
            return taken
    return len(masses)


def _within_budget(call: _Call, count: int) -> int:
    """Steps 1 and 5: raise to the minimum, then cap (the cap wins), never more than N."""
    return min(max(count, call.min_blocks), call.cap, call.num_blocks)


def _query_aware_count(call: _Call) -> int:
    """Step 7: n_v = n_s = minb; capped in coverage mode only (the published code sets it after its capping)."""
    return call.floor if call.coverage else min(call.min_blocks, call.num_blocks)


def _raw_count(call: _Call, tokens: np.ndarray, masses: np.ndarray) -> int:
    """Number of blocks that gamma asks for, before the budgets."""
    if call.coverage:
        return _coverage_count(masses, call.settings.gamma, forced=True)
    return _reference_count(tokens, call.settings.gamma)


def _forced(masses: np.ndarray) -> np.ndarray:
    """Step 8: index 0 (key block 0, slash distance 0) scores +inf and counts against the budget."""
    scores = masses.copy()
    scores[0] = np.inf
    return scores


def _top(masses: np.ndarray, count: int) -> tuple[int, ...]:
    """Step 9: the ``count`` best indices with index 0 forced, ascending."""
    return tuple(sorted(int(j) for j in _ranking(_forced(masses))[:count]))


def _diagonals(call: _Call, buckets: tuple[int, ...]) -> tuple[int, ...]:
    """Step 10: block diagonals of the chosen slash buckets: s (reference), s and s+1 (coverage)."""
    found: set[int] = set()
    for s in buckets:
        found.add(s)
        if call.coverage and s + 1 < call.num_blocks:
            found.add(s + 1)
    return tuple(sorted(found))


def _head_profile(call: _Call, queries: np.ndarray, keys: np.ndarray) -> HeadProfile:
    """Steps 2-9 for one head."""
    vert, slash = _token_profiles(call, queries, keys)
    vert_blk = _pool_vertical(call, vert)
    slash_blk = _pool_slash(call, slash)
    abar = _pooled_estimate(call, queries, keys)
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


# ------------------------------------------------------------------------------------------------ block sets


def _vertical_slash_blocks(call: _Call, profile: HeadProfile) -> np.ndarray:
    """Step 10: chosen key blocks at or before the row, and chosen block diagonals, bool [NQ, N]."""
    mask = np.zeros((call.num_rows, call.num_blocks), dtype=bool)
    for i in range(call.num_rows):
        row = call.first_row + i
        for j in profile.verticals:
            if j <= row:
                mask[i, j] = True
        for s in profile.diagonals:
            if s <= row:
                mask[i, row - s] = True
    return mask


def _query_aware_blocks(call: _Call, attention: np.ndarray) -> np.ndarray:
    """Step 11, reference (one quota over all rows) or coverage (one quota per row), bool [NQ, N]."""
    if call.coverage:
        return np.stack([_row_cover(call, attention[i], i) for i in range(call.num_rows)])
    return _flat_cover(call, attention)


def _flat_cover(call: _Call, attention: np.ndarray) -> np.ndarray:
    """Reference: entries of the flattened matrix whose INCLUSIVE running sum is <= gamma * NQ."""
    flat = attention.reshape(-1)
    chosen = np.zeros(flat.shape, dtype=bool)
    total = 0.0
    for index in _ranking(flat):
        total += flat[index]
        if total > call.settings.gamma * call.num_rows:
            break
        chosen[index] = True
    return chosen.reshape(attention.shape)


def _row_cover(call: _Call, row: np.ndarray, i: int) -> np.ndarray:
    """Coverage: smallest set of key blocks J <= I that reaches gamma (crossing block included), then the cap."""
    visible = row[: call.first_row + i + 1]
    count = min(_coverage_count(visible, call.settings.gamma, forced=False), call.cap)
    chosen = np.zeros(row.shape, dtype=bool)
    for j in _ranking(visible)[:count]:
        chosen[j] = True
    return chosen


# ------------------------------------------------------------------------------------------------ margins


def _relative(value: float, threshold: float) -> float:
    return abs(value - threshold) / abs(threshold) if threshold != 0 else abs(value)


def _rank_gap(scores: np.ndarray, count: int, forced: bool) -> float:
    """Relative gap between the last chosen and the first unchosen score; a forced index 0 is no choice."""
    free = scores[1:] if forced else scores
    taken = count - 1 if forced else count
    if taken <= 0 or taken >= len(free):
        return math.inf
    ordered = free[_ranking(free)]
    last, first_out = float(ordered[taken - 1]), float(ordered[taken])
    if last == 0.0:
        return math.inf  # both are exact zeros: the tie rule decides, in every precision
    if last < FLOAT32_ZERO_RISK:
        return 0.0
    return (last - first_out) / last


def _changed_counts(raw: int, low: int, high: int) -> tuple[int | None, int | None]:
    """Nearest raw counts below and above ``raw`` that change min(max(raw, low), high); None where there is none."""
    down = min(raw, high) - 1
    up = max(raw, low) + 1
    return (down if down >= low else None), (up if up <= high else None)


def _coverage_count_margin(masses: np.ndarray, gamma: float, low: int, high: int, forced: bool) -> float:
    """Distance of the running sums from gamma where crossing it would change the clamped ``_coverage_count``."""
    sums = _cumulative(masses, forced)
    down, up = _changed_counts(_coverage_count(masses, gamma, forced), low, high)
    margin = math.inf
    if down is not None:  # the count is at most ``down`` iff the first ``down`` entries reach gamma
        margin = min(margin, _relative(sums[down - 1], gamma))
    if up is not None:  # the count is at least ``up`` iff the first ``up - 1`` entries do not
        margin = min(margin, _relative(sums[up - 2], gamma))
    return margin


def _reference_count_margin(tokens: np.ndarray, gamma: float, low: int, high: int) -> float:
    """Distance of the running sums from gamma where crossing it would change the clamped ``_reference_count``.

    c // 128 + 1 >= x iff c >= 128 (x - 1) iff the first 128 (x - 1) - 1 tokens sum to <= gamma.
    """
    sums = _cumulative(tokens)
    down, up = _changed_counts(_reference_count(tokens, gamma), low, high)
    margin = math.inf
    for least in (None if down is None else down + 1, up):
        if least is None:
            continue
        needed = TOKENS_PER_COUNTED_BLOCK * (least - 1) - 1
        if needed <= len(sums):  # with fewer tokens the step cannot be reached at all
            margin = min(margin, _relative(sums[needed - 1], gamma))
    return margin


def _switch_margin(call: _Call, profile: HeadProfile) -> float:
    """sqrt(JS) against tau; 0 when float32 underflow could turn a query-aware head to NaN (reference only)."""
    if call.settings.tau <= 0 or math.isnan(profile.js_distance):
        return math.inf
    smallest = min(np.min(profile.abar), np.min(profile.vert_blk))
    if not call.coverage and profile.query_aware and smallest < FLOAT32_ZERO_RISK:
        return 0.0
    return _relative(profile.js_distance, call.settings.tau)


def _vertical_slash_margin(call: _Call, profile: HeadProfile) -> float:
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


def _query_aware_margins(call: _Call, attention: np.ndarray) -> np.ndarray:
    """Margin of the query-aware cover per row [NQ]; the reference quota couples all rows."""
    if not call.coverage:
        return np.full(call.num_rows, _flat_cover_margin(call, attention))
    margins = np.full(call.num_rows, np.inf)
    for i in range(call.num_rows):
        visible = attention[i, : call.first_row + i + 1]
        high = min(call.cap, len(visible))
        count = min(_coverage_count(visible, call.settings.gamma, forced=False), high)
        margins[i] = min(
            _rank_gap(visible, count, forced=False),
            _coverage_count_margin(visible, call.settings.gamma, 1, high, forced=False),
        )
    return margins


def _flat_cover_margin(call: _Call, attention: np.ndarray) -> float:
    """Running sums next to the quota gamma * NQ, and the gap between the last kept and first dropped entry."""
    flat = attention.reshape(-1)
    sums = _cumulative(flat)
    quota = call.settings.gamma * call.num_rows
    kept = int(np.sum(_flat_cover(call, attention)))
    margin = _rank_gap(flat, kept, forced=False)
    if kept > 0:
        margin = min(margin, _relative(sums[kept - 1], quota))
    if kept < len(sums):
        margin = min(margin, _relative(sums[kept], quota))
    return margin
