"""Scores are checked on hand-made cases, intervals against the literature and against simulation."""

import random

import pytest

from sparse_patch.evaluation.scoring import exact_match, found, interval, mean_interval


def test_found_counts_strings_in_any_case() -> None:
    """As RULER's string_match_all: a reference counts if it is anywhere in the prediction."""
    assert found("They are ABCDE, fghij.", ["abcde", "FGHIJ", "XXXXX"]) == 2
    assert found("", ["1"]) == 0
    assert found("12345678", ["1234567"]) == 1


def test_exact_match_is_a_prefix_but_for_white_space() -> None:
    assert exact_match(" 1234567. And more", " 1234567") and exact_match("\n1, 2", " 1, 2")
    assert not exact_match("It is 1234567", " 1234567") and not exact_match("", "1")


def test_wilson_interval_of_independent_trials() -> None:
    """The figures are from Brown, Cai and DasGupta (2001) and from R's prop.test without correction."""
    assert interval([0] * 10, [1] * 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert interval([1] * 10, [1] * 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert interval([1] * 8 + [0] * 2, [1] * 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_trials_that_go_together_widen_the_interval() -> None:
    """With two of ten answers entirely wrong, the share is as uncertain as with ten trials, not a thousand."""
    together = interval([100] * 8 + [0] * 2, [100] * 10)
    alone = interval([80] * 10, [100] * 10)
    ten = interval([1] * 8 + [0] * 2, [1] * 10)
    assert alone[1] - alone[0] < 0.06
    assert together == pytest.approx(ten, abs=0.02)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """The trials are clustered: each sample has 20 tokens and its own share; the true share is 0.8."""
    rng = random.Random(0)
    inside = 0
    for _ in range(1000):
        shares = [rng.betavariate(8, 2) for _ in range(20)]
        successes = [sum(rng.random() < share for _ in range(20)) for share in shares]
        low, high = interval(successes, [20] * 20)
        inside += low <= 0.8 <= high
    assert 0.91 <= inside / 1000 <= 0.99


def test_the_interval_of_a_mean() -> None:
    """The t quantiles are those of the tables: 12.706 for two values, 2.262 for ten."""
    assert mean_interval([1.0, 3.0]) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)
    ten = [float(number) for number in range(10)]
    half = 2.2622 * (55 / 6) ** 0.5 / 10**0.5
    assert mean_interval(ten) == pytest.approx((4.5 - half, 4.5 + half), abs=1e-3)
    assert mean_interval([1.0, 3.0], least=0.0) == pytest.approx((0, 14.706), abs=1e-3)
    assert mean_interval([1.0]) is None


def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says() -> None:
    rng = random.Random(0)
    inside = 0
    for _ in range(1000):
        ends = mean_interval([rng.gauss(5, 2) for _ in range(3)])
        assert ends is not None
        inside += ends[0] <= 5 <= ends[1]
    assert 0.93 <= inside / 1000 <= 0.97
