"""Rules and their choice: compared with brute force if there are few, else checked for what must always hold."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from sparse_patch.artefacts.head_schedules import HeadSchedules
from sparse_patch.calibration.moa.optimise import Problem, evaluate, frontier, solve, sweep
from sparse_patch.calibration.moa.schedules import FULL, STREAMING, Rule, densities, losses, schedules_for
from sparse_patch.errors import TaskError
from sparse_patch.model_shape import ModelShape


def problem_of(
    layers: int,
    heads: int,
    rules: int,
    lengths: int = 2,
    seed: int = 0,
    bound: float = 0.5,
    *,
    max_rules: int | None = None,
) -> Problem:
    """Heads that lose less the more they keep, some a lot and some a little, differently at every length."""
    rng = np.random.default_rng(seed)
    kept = np.sort(rng.uniform(0.1, 1, (lengths, rules)), 1)
    kept[:, -1] = 1
    steep = rng.uniform(0.5, 8, (lengths, layers, heads, 1))
    weight = rng.lognormal(0, 2, (lengths, layers, heads, 1))
    return Problem(weight * (1 - kept[:, None, None]) ** steep, kept, np.full(lengths, bound), max_rules)


def brute_force(problem: Problem, primary: int, limits: list[float] | None = None) -> float:
    """The smallest loss of all choices within the limits; infinity if there is none."""
    best = np.inf
    assignments = list(product(range(problem.rules), repeat=problem.heads))
    for rows in product(assignments, repeat=problem.layers):
        choice = np.array(rows)
        if problem.max_rules and max(len(set(row)) for row in rows) > problem.max_rules:
            continue
        lost, density = evaluate(problem, choice)
        if (density <= problem.bounds + 1e-9).all() and (limits is None or (lost <= np.array(limits) + 1e-12).all()):
            best = min(best, float(lost[primary]))
    return best


@pytest.mark.parametrize("max_rules", [None, 1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_best_there_is(seed: int, max_rules: int | None) -> None:
    problem = problem_of(2, 3, 4, seed=seed, bound=0.45 + 0.05 * (seed % 4), max_rules=max_rules)
    for primary in (0, 1):
        expected = brute_force(problem, primary)
        found = solve(problem, primary)
        assert (found is None) == np.isinf(expected)
        if found is not None:
            assert found.losses[primary] == pytest.approx(expected) and found.gap == pytest.approx(0, abs=1e-6)
            limits = [np.inf, np.inf]
            limits[1 - primary] = 0.9 * float(found.losses[1 - primary])
            held, expected = solve(problem, primary, limits), brute_force(problem, primary, limits)
            assert (held is None) == np.isinf(expected)
            assert held is None or held.losses[primary] == pytest.approx(expected)


@pytest.mark.parametrize("max_rules", [None, 1, 2, 3])
@pytest.mark.parametrize("layers, heads, rules", [(6, 8, 20), (4, 2, 48), (12, 4, 10)])
def test_what_must_hold(layers: int, heads: int, rules: int, max_rules: int | None) -> None:
    previous = np.inf
    for bound in (0.3, 0.45, 0.6, 0.9, 1.0):
        problem = problem_of(layers, heads, rules, lengths=3, bound=bound, max_rules=max_rules)
        plan = solve(problem, 1)
        assert plan is not None and (plan.densities <= bound + 1e-8).all()
        lost, density = evaluate(problem, plan.choice)
        np.testing.assert_allclose(plan.losses, lost)
        np.testing.assert_allclose(plan.densities, density)
        assert 0 <= plan.bound <= plan.losses[1] and plan.losses[1] - plan.bound <= 0.01 * max(plan.losses[1], 0.1)
        if max_rules is not None:
            assert max(len(set(row)) for row in plan.choice.tolist()) <= max_rules
        assert plan.losses[1] <= previous * (1 + 0.02), "a larger density never costs more, but for the gap"
        previous = float(plan.losses[1])
    assert previous < 1e-3, "everything is allowed and nothing is lost"


def test_a_sweep_gives_plans_of_which_none_is_worse() -> None:
    problem = problem_of(4, 2, 16, lengths=3, seed=3, max_rules=2)
    plans = sweep(problem)
    assert len(plans) > 3 and len({plan.choice.tobytes() for plan in plans}) == len(plans)
    for plan in plans:
        assert (plan.densities <= 0.5 + 1e-8).all()
        for other in plans:
            assert other is plan or not ((other.losses <= plan.losses).all() and (other.losses < plan.losses).any())
    for primary in range(3):
        alone = solve(problem, primary)
        assert alone is not None
        assert min(plan.losses[primary] for plan in plans) == pytest.approx(alone.losses[primary])
    assert len(sweep(problem_of(3, 2, 6, lengths=4))) > 3
    single = Problem(problem.losses[:1], problem.densities, problem.bounds, 2)
    assert len(sweep(single)) == 1


def test_a_floor_is_kept() -> None:
    """Two rules keep the same at the length with losses; the better one keeps little at another length."""
    losses_ = np.tile([0.0, 1.0], (1, 3, 2, 1))
    problem = Problem(losses_, np.array([[0.5, 0.5], [0.2, 0.5]]), np.full(2, 0.5))
    free, held = solve(problem, 0), solve(replace(problem, floors=np.array([0.0, 0.4])), 0)
    assert free is not None and free.densities.tolist() == [0.5, pytest.approx(0.2)] and free.losses[0] == 0
    assert held is not None and held.losses[0] == 4 and held.densities[1] == pytest.approx(0.4)


def test_a_frontier_falls() -> None:
    found = frontier(problem_of(3, 2, 8), 0, [0.01, 0.4, 0.6, 0.8])
    assert found[0] is None
    values = [float(plan.losses[0]) for plan in found if plan is not None]
    assert len(values) == 3 and values == sorted(values, reverse=True)


def test_what_cannot_be_asked() -> None:
    with pytest.raises(TaskError, match="--density: no schedules keep what they may"):
        sweep(problem_of(2, 2, 4, bound=0.01))
    with pytest.raises(TaskError, match="--max-rules: expected 1 to 3, or 0 for no limit, got 4"):
        problem_of(2, 8, 4, max_rules=4)
    assert problem_of(2, 4, 4, max_rules=4).sets is None, "no limit where a layer has no more heads"


def test_the_rules_of_the_public_code() -> None:
    """48 of 99 pairs are valid for lengths of 2k, 4k and 8k and a density at 16k; the streaming rule is added."""
    valid = [
        Rule(alpha, eighths / 8)
        for alpha in range(-2048, 8193, 1024)
        for eighths in range(9)
        if alpha + eighths / 8 * 8192 <= 8192 and alpha + eighths / 8 * 16384 <= 16384 and alpha + eighths * 256 > 0
    ]
    assert len(valid) == 48
    found = schedules_for([2048, 4096, 8192], [2048, 4096, 8192, 16384])
    assert found[0] == STREAMING
    found.remove(STREAMING)
    spans = {tuple(rule.kept(length) for length in (2048, 4096, 8192, 16384)) for rule in valid}
    assert set(found) <= set(valid) and {tuple(r.kept(n) for n in (2048, 4096, 8192, 16384)) for r in found} == spans
    assert len(found) == len(spans) and FULL in found
    small = schedules_for([256, 512], [256, 512])
    assert (
        FULL in small
        and {rule.alpha for rule in small} <= {320.0, *(128.0 * n for n in range(-2, 5))}
        and len(small) > 8
    )


def test_a_rule_loses_what_its_window_drops() -> None:
    length, blocks = 640, 10
    curves = np.arange(blocks, 0, -1.0)[None, None]  # 10 with a window of nothing, 1 with one of 9 blocks
    rules = [Rule(0, 0.0), Rule(0, 0.5), Rule(256, 0.25), Rule(-64, 1.0), FULL]
    plan = HeadSchedules.of(ModelShape("x", 1, 5, 5, 5), [[r.alpha for r in rules]], [[r.beta for r in rules]])
    windows = [window // 64 for window in plan.spans(0, length)[1]]
    assert windows == [1, 4, 6, 8, 9]
    assert losses(curves, rules, length)[0, 0].tolist() == [9.0, 6.0, 4.0, 2.0, 0.0]
    kept = [plan.kept(0, length)[head] / length for head in range(5)]
    assert densities(rules, [length])[0].tolist() == kept
