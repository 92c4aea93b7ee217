"""Steps 10 and 11: the vertical-slash set and the query-aware set."""

from __future__ import annotations

import numpy as np

from oracles.flexprefill.call import Call, HeadProfile
from oracles.flexprefill.profile import coverage_count, ranking


def check_forced(call: Call, mask: np.ndarray) -> None:
    """Steps 8 and 10: key block 0 and the diagonal block of every row are on."""
    for i in range(call.num_rows):
        assert mask[i, 0], f"row {i}: key block 0 is off"
        assert mask[i, call.first_row + i], f"row {i}: the diagonal block is off"


def vertical_slash_blocks(call: Call, profile: HeadProfile) -> np.ndarray:
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


def query_aware_blocks(call: Call, attention: np.ndarray) -> np.ndarray:
    """Step 11, reference (one quota over all rows) or coverage (one quota per row), bool [NQ, N]."""
    if call.coverage:
        return np.stack([_row_cover(call, attention[i], i) for i in range(call.num_rows)])
    return flat_cover(call, attention)


def flat_cover(call: Call, attention: np.ndarray) -> np.ndarray:
    """Reference: entries of the flattened matrix whose INCLUSIVE running sum is <= gamma * NQ."""
    flat = attention.reshape(-1)
    chosen = np.zeros(flat.shape, dtype=bool)
    total = 0.0
    for index in ranking(flat):
        total += flat[index]
        if total > call.settings.gamma * call.num_rows:
            break
        chosen[index] = True
    return chosen.reshape(attention.shape)


def _row_cover(call: Call, row: np.ndarray, i: int) -> np.ndarray:
    """Coverage: smallest set of key blocks J <= I that reaches gamma (crossing block included), then the cap."""
    visible = row[: call.first_row + i + 1]
    count = min(coverage_count(visible, call.settings.gamma, forced=False), call.cap)
    chosen = np.zeros(row.shape, dtype=bool)
    for j in ranking(visible)[:count]:
        chosen[j] = True
    return chosen
