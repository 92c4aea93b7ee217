"""Slow float64 oracle for MInference's patterns and for A-shape, written only from the specification.

One unpadded sequence; the queries are the last ``Sq`` of ``n`` tokens. Everything loops over tokens. A pattern is
(kind, a, b) as in MInference's files. Blocks are squares of ``size`` tokens on a grid from the first token; a rule for
tokens is rounded up to the blocks that it touches, over all rows that a grid block of queries would have.
"""

from __future__ import annotations

import math

import numpy as np

LAST = 64
SINKS = 30
LOCAL = 100


def minference_mask(
    q: np.ndarray,
    k: np.ndarray,
    scale: float,
    patterns: list[tuple[str, int, int]],
    size: int,
    block_budget: int = 6400,
    softcap: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What each query reads, bool ``[Hq, Sq, n]``, and by how much each head's selection is decided, ``[Hq]``.

    The margin is the relative gap between the last selected and the first omitted entry of every top-k; below rounding
    another implementation may choose differently.
    """
    heads, group = q.shape[0], q.shape[0] // k.shape[0]
    masks, margins = [], []
    for head in range(heads):
        kind, a, b = patterns[head]
        args = (q[head], k[head // group], scale, softcap)
        if kind == "vertical_and_slash":
            mask, margin = _vertical_slash(*args, a, b, size)
        elif kind == "stream_llm":
            mask, margin = a_shape_mask(q.shape[1], k.shape[1], a, b, 0, size), math.inf
        else:
            mask, margin = _block_sparse(*args, max(2, -(-block_budget // size)), size)
        masks.append(mask)
        margins.append(margin)
    return np.stack(masks), np.array(margins)


def token_sets(
    q: np.ndarray, k: np.ndarray, scale: float, softcap: float | None, verticals: int, slashes: int
) -> tuple[list[int], list[int], float]:
    """The selected keys V and distances S of one head, and the margin."""
    n = k.shape[0]
    column, diagonal = [0.0] * n, [0.0] * n
    rows = min(LAST, len(q))
    for row in range(len(q) - rows, len(q)):
        position = n - len(q) + row
        p = _softmax([_logit(q[row], k[j], scale, softcap) for j in range(position + 1)])
        for j in range(position + 1):
            column[j] += p[j]
            diagonal[position - j] += p[j]
    chosen_columns, margin_v = _top(column, min(n, max(verticals, SINKS)), SINKS)
    chosen_diagonals, margin_s = _top(diagonal, min(n, max(slashes, LOCAL)), LOCAL)
    return chosen_columns, chosen_diagonals, min(margin_v, margin_s)


def a_shape_mask(queries: int, n: int, sink: int, window: int, last: int, size: int) -> np.ndarray:
    """Bool ``[Sq, n]``."""
    blocks = set()
    for i in range(math.ceil(n / size) * size):  # rows past the end belong to the grid's last block
        for j in range(i + 1):
            if i - j < window or j < sink or (n - last <= i < n and i >= n - queries):
                blocks.add((i // size, j // size))
    return _mask_of(queries, n, blocks, set(), size)


def _vertical_slash(
    q: np.ndarray, k: np.ndarray, scale: float, softcap: float | None, a: int, b: int, size: int
) -> tuple[np.ndarray, float]:
    n = k.shape[0]
    verticals, slashes, margin = token_sets(q, k, scale, softcap, a, b)
    blocks = set()
    for i in range(math.ceil(n / size) * size):
        for o in slashes:
            if i - o >= 0:
                blocks.add((i // size, (i - o) // size))
    return _mask_of(len(q), n, blocks, set(verticals), size), margin


def _block_sparse(
    q: np.ndarray, k: np.ndarray, scale: float, softcap: float | None, number: int, size: int
) -> tuple[np.ndarray, float]:
    queries, n = len(q), k.shape[0]
    start = n - queries
    margin, blocks = math.inf, set()
    for block in range(start // size, (n - 1) // size + 1):
        first, end = max(block * size, start), min((block + 1) * size, n)
        mean_q = sum(q[i - start] for i in range(first, end)) / (end - first)
        logits = []
        for key_block in range(block + 1):
            keys = range(key_block * size, min((key_block + 1) * size, n))
            logits.append(_logit(mean_q, sum(k[j] for j in keys) / len(keys), scale, softcap))
        p = _softmax(logits)
        ranked = sorted(range(block + 1), key=lambda j: (j not in (0, block), -p[j], j))
        chosen = ranked[:number]
        if number < len(ranked):
            margin = min(margin, _gap(p[chosen[-1]], p[ranked[number]]) if number > 2 else math.inf)
        blocks |= {(block, key_block) for key_block in chosen}
    return _mask_of(queries, n, blocks, set(), size), margin


def _mask_of(queries: int, n: int, blocks: set[tuple[int, int]], verticals: set[int], size: int) -> np.ndarray:
    mask = np.zeros((queries, n), dtype=bool)
    for row in range(queries):
        i = n - queries + row
        for j in range(i + 1):
            mask[row, j] = (i // size, j // size) in blocks or (j in verticals and j // size < i // size)
    return mask


def _top(mass: list[float], number: int, forced: int) -> tuple[list[int], float]:
    """The ``number`` largest entries: the first ``forced`` before all others, and of equal ones the lower index."""
    order = sorted(range(len(mass)), key=lambda index: (index >= forced, -mass[index], index))
    if number >= len(mass) or number <= forced:
        return order[:number], math.inf
    return order[:number], _gap(mass[order[number - 1]], mass[order[number]])


def _gap(kept: float, left: float) -> float:
    return (kept - left) / kept if kept > 1e-30 else 0.0


def _logit(q: np.ndarray, k: np.ndarray, scale: float, softcap: float | None) -> float:
    logit = float(q @ k) * scale
    return logit if softcap is None else softcap * math.tanh(logit / softcap)


def _softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    exps = [math.exp(logit - top) for logit in logits]
    total = sum(exps)
    return [value / total for value in exps]
