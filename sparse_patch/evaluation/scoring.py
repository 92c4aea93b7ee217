"""Scores: RULER's recall, exact match, and confidence intervals for shares that come in clusters and for means."""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist, fmean, stdev

from scipy.special import stdtrit


def found(text: str, expected: Sequence[str]) -> int:
    """Count the expected strings that the text contains, ignoring case (RULER's `string_match_all`)."""
    lowered = text.lower()
    return sum(string.lower() in lowered for string in expected)


def exact_match(text: str, answer: str) -> bool:
    """Whether the text begins with the answer, ignoring white space before either."""
    return text.lstrip().startswith(answer.strip())


def interval(successes: Sequence[int], trials: Sequence[int], confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for the share of successes, widened if the trials of one sample are correlated.

    Wilson's interval (1927) stays inside [0, 1] and does not shrink to a point if every trial succeeds. The number of
    trials is divided by Kish's design effect (Survey Sampling, 1965), which is estimated from how much the samples
    differ: 200 tokens of one wrong answer are not 200 independent mistakes.

    Args:
        successes: number of successful trials of each sample.
        trials: number of trials of each sample.
        confidence: how often such an interval contains the true share.
    """
    total = sum(trials)
    share = sum(successes) / total
    size = total / _design_effect(successes, trials, share)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    center = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    return max(0.0, center - half), min(1.0, center + half)


def mean_interval(
    values: Sequence[float], least: float | None = None, confidence: float = 0.95
) -> tuple[float, float] | None:
    """Student's t interval for a mean over prompts; None for a single prompt.

    It suits few prompts; a bootstrap of three values never leaves their range.

    Args:
        values: one value per prompt.
        least: the least possible value; the interval ends there.
        confidence: how often such an interval contains the true mean, if the values are about normally distributed.
    """
    number = len(values)
    if number < 2:
        return None
    middle, half = fmean(values), float(stdtrit(number - 1, (1 + confidence) / 2)) * stdev(values) / sqrt(number)
    low = middle - half
    return low if least is None else max(low, least), middle + half


def _design_effect(successes: Sequence[int], trials: Sequence[int], share: float) -> float:
    """Variance of the share over samples, relative to independent trials; at least 1, at most trials per sample."""
    number, total = len(trials), sum(trials)
    if number < 2 or share in (0.0, 1.0):
        return 1.0
    residuals = sum((right - share * n) ** 2 for right, n in zip(successes, trials, strict=True))
    clustered = residuals * number / (number - 1) / total**2
    return min(max(1.0, clustered * total / (share * (1 - share))), total / number)
