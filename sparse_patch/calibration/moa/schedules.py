"""The rules that a search chooses from, and what each rule keeps and loses at every length."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sparse_patch.artefacts.head_schedules import HeadSchedules
from sparse_patch.calibration.moa.influence import BLOCK
from sparse_patch.model_shape import ModelShape

STEP = 1024  # step of alpha, in tokens, as in the public code
EIGHTHS = 8  # beta is a multiple of 1/8
_ANY = HeadSchedules.of(ModelShape("", 1, 1, 1, 1), [[0]], [[1]])  # has the sizes of all schedules


class Rule(NamedTuple):
    """A head keeps `alpha + beta * length` tokens."""

    alpha: float
    beta: float

    def kept(self, length: int) -> int:
        """Tokens kept at a length; at most all of them."""
        return min(_ANY.room(self.alpha, self.beta, length), length)

    def __str__(self) -> str:
        return f"{self.alpha:g} + {self.beta:g} N"


FULL = Rule(0.0, 1.0)
STREAMING = Rule(320.0, 0.0)  # rule of DuoAttention's streaming heads: 64 first and 256 last tokens


def schedules_for(profiled: Sequence[int], bounded: Sequence[int]) -> list[Rule]:
    """The rules of MoA's public code, and the rule of DuoAttention's streaming heads; the shortest spans come first.

    alpha goes from minus the shortest length to the longest profiled length in steps of 1024 tokens, or of half the
    shortest length if that is less. beta goes in eighths. A rule's span must be positive at the shortest length, and at
    most the whole length at the longest profiled length and at the longest bounded length. Of rules that keep the same
    number of tokens at all lengths, one is kept. With the streaming rule, a search can also find DuoAttention's
    schedules.

    Args:
        profiled: lengths with a measured influence.
        bounded: lengths with a bound on the density; they may differ from `profiled`.
    """
    shortest, longest = min(*profiled, *bounded), max(profiled)
    furthest = max(longest, *bounded)
    step = min(STEP, max(BLOCK, shortest // 2 // BLOCK * BLOCK))
    rules: dict[tuple[int, ...], Rule] = {}
    for alpha in range(-(shortest // step) * step, longest + 1, step):
        for eighths in range(EIGHTHS + 1):
            rule = Rule(float(alpha), eighths / EIGHTHS)
            within = all(alpha + rule.beta * length <= length for length in (longest, furthest))
            if within and alpha + rule.beta * shortest > 0:
                rules.setdefault(tuple(rule.kept(length) for length in (*profiled, *bounded)), rule)
    rules.setdefault(tuple(STREAMING.kept(length) for length in (*profiled, *bounded)), STREAMING)
    return [rules[kept] for kept in sorted(rules, key=lambda kept: (sum(kept), kept))]


def densities(rules: Sequence[Rule], lengths: Sequence[int]) -> np.ndarray:
    """Share of the keys that each rule keeps, `[lengths, rules]`."""
    return np.array([[rule.kept(length) / length for rule in rules] for length in lengths])


def losses(curves: np.ndarray, rules: Sequence[Rule], length: int) -> np.ndarray:
    """What each rule loses at a length, `[layers, heads, rules]`.

    Args:
        curves: loss by the window in blocks, `[layers, heads, blocks]`; see `Influence`.
        rules: the rules to choose from.
        length: length of the prompts of the curves.
    """
    last = curves.shape[2]  # a window this wide loses nothing
    windows = [min((rule.kept(length) - BLOCK) // BLOCK, last) for rule in rules]
    windows = [last if rule.kept(length) == length else window for rule, window in zip(rules, windows, strict=True)]
    return np.pad(curves, ((0, 0), (0, 0), (0, 1)))[:, :, windows]


def least_density(profiled: Sequence[int], bounded: Sequence[int]) -> float:
    """The smallest bound on the density that some rule satisfies at all lengths."""
    return float(densities(schedules_for(profiled, bounded), bounded).max(0).min())
