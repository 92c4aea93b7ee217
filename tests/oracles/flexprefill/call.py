"""Sizes and settings of one call, and steps 0 and 1: dense shortcuts and budgets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOKENS_PER_COUNTED_BLOCK = 128  # step 5: literal divisor of the published code, whatever the block size is
FLOAT32_ZERO_RISK = 1e-30  # a probability between 0 and this may be an exact 0 in a float32 implementation


@dataclass(frozen=True)
class FlexPrefillSettings:
    """Hyper-parameters; budgets in tokens; ``selection`` is "reference" or "coverage"."""

    gamma: float
    tau: float
    min_budget: int
    max_budget: int | None
    block_size: int
    selection: str


@dataclass(frozen=True)
class HeadProfile:
    """Intermediate results of one query head; block masses are those before forcing (step 8)."""

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
class Call:
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


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def make_call(q: np.ndarray, k: np.ndarray, scale: float, settings: FlexPrefillSettings, softcap: float | None) -> Call:
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
    return Call(n, q.shape[1], _ceil_div(n, settings.block_size), scale, softcap, settings)


def is_dense(call: Call) -> bool:
    """Step 0, plus gamma >= 1 (section 1.2: reference gamma = 1 is not dense by itself) and Sq <= B."""
    minimum = _ceil_div(call.settings.min_budget, call.block) * call.block
    return call.n <= max(2 * call.block, minimum) or call.settings.gamma >= 1 or call.num_queries <= call.block


def causal_blocks(call: Call) -> np.ndarray:
    """Every (row, key block) with J <= I, bool [NQ, N]."""
    mask = np.zeros((call.num_rows, call.num_blocks), dtype=bool)
    for i in range(call.num_rows):
        for j in range(call.first_row + i + 1):
            mask[i, j] = True
    return mask


def head_inputs(q: np.ndarray, k: np.ndarray, h: int) -> tuple[np.ndarray, np.ndarray]:
    """Float64 queries [Sq, D] of head h and keys [n, D] of its KV head h // G (section 0.2)."""
    group = q.shape[0] // k.shape[0]
    return q[h].astype(np.float64), k[h // group].astype(np.float64)
