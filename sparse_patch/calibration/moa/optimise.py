"""The choice of each head's rule: the least loss within a density, at several lengths at once, with open solvers.

MoA's public code gives the whole problem, a binary variable for each head and rule, to a commercial solver. Here a
column is a whole layer, with the rules of all its heads (Dantzig-Wolfe). The linear program over the columns known so
far gives prices of density and loss, and the best column of each layer at these prices is found exactly. When no new
column pays, the linear program bounds every solution from below. An integer program over the columns then chooses a
solution. After that, columns that could improve it by the gap are added. If they are few, all of them are added, and
the solution is optimal; else the best columns of each set of rules are added, at prices around the last ones. If a
layer may have any number of rules, every head is treated as a layer, so all its columns are known from the start.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations, product

import numpy as np
from scipy import optimize

from sparse_patch.errors import TaskError

MOST_RULES = 3  # most rules of a layer if their number is limited: all sets of this size are tried
_PENALTY = 1e4  # cost per unit by which a linear program exceeds a limit; losses are scaled to 1
_TOLERANCE = 1e-9
_MOST_ASSIGNMENTS = 200_000  # most assignments of rules to a layer's heads to look through
_MOST_COLUMNS = 20_000
_SECONDS = 60.0
_AROUND = (0.7, 0.85, 1.0, 1.15, 1.4)  # factors on the prices
_EACH = 40  # columns per layer for each factor
# Limits on a loss in the sweep, as shares of its range, by the number of lengths. All combinations are tried.
_LEVELS = {1: (), 2: (0.25, 0.5, 0.75), 3: (0.25, 0.5, 0.75)}
_FEW_LEVELS = (1 / 3, 2 / 3)


@dataclass(frozen=True)
class Problem:
    """What rules lose and keep, and the limits of a solution.

    Attributes:
        losses: loss of each rule in each head, `[lengths, layers, heads, rules]`.
        densities: share of the keys that a rule keeps, `[bounded lengths, rules]`.
        bounds: largest mean density over all heads, `[bounded lengths]`.
        max_rules: most different rules in a layer; None if unlimited.
        floors: smallest mean density over all heads, `[bounded lengths]`; None if there is no lower limit. Without a
            lower limit, a solution may spend its density at the lengths with losses and keep little at the others.
    """

    losses: np.ndarray
    densities: np.ndarray
    bounds: np.ndarray
    max_rules: int | None = None
    floors: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.max_rules is not None and not 1 <= self.max_rules <= MOST_RULES and self.max_rules < self.heads:
            raise TaskError(f"--max-rules: expected 1 to {MOST_RULES}, or 0 for no limit, got {self.max_rules}")

    @property
    def layers(self) -> int:
        return int(self.losses.shape[1])

    @property
    def heads(self) -> int:
        return int(self.losses.shape[2])

    @property
    def rules(self) -> int:
        return int(self.losses.shape[3])

    @cached_property
    def sets(self) -> np.ndarray | None:
        """The sets of rules that a layer may have, `[sets, max_rules]`; None if every set is allowed."""
        if self.max_rules is None or self.max_rules >= min(self.heads, self.rules):
            return None
        return np.array(list(combinations(range(self.rules), self.max_rules)))

    @cached_property
    def scales(self) -> np.ndarray:
        """The divisors of losses in the programs, `[lengths]`: the loss of the best single rule for all heads."""
        uniform = self.losses.sum((1, 2))
        within = (self.densities <= self.bounds[:, None]).all(0)
        best = np.where(within, uniform, np.inf).min(1)
        return np.where(np.isfinite(best) & (best > 0), best, np.maximum(uniform.max(1), 1e-30))

    def per_head(self) -> "Problem":
        """The same problem with every head treated as a layer."""
        return replace(self, losses=self.losses.reshape(len(self.losses), -1, 1, self.rules))


@dataclass(frozen=True)
class Solution:
    """The rule of each head.

    Attributes:
        choice: the rule of each head, `[layers, heads]`.
        losses: loss at each length.
        densities: density at each bounded length.
        bound: lower bound on the loss of any solution within the same limits, at the minimised length.
        gap: how much more the solution may lose than the best one, relative to its own loss.
    """

    choice: np.ndarray
    losses: np.ndarray
    densities: np.ndarray
    bound: float
    gap: float


def solve(problem: Problem, primary: int, limits: Sequence[float] | None = None) -> Solution | None:
    """Find the solution of smallest loss at one length; None if no solution is within the limits.

    Args:
        problem: the problem to solve.
        primary: index of the length.
        limits: largest loss at each length; infinity if unlimited.
    """
    search = _Search.of(problem.per_head() if problem.sets is None else problem, primary, limits)
    search.add_uniform()
    bound, prices = search.generate()
    choice, least = search.choose()
    gap = np.inf if choice is None else search.value(choice) - bound
    if problem.sets is None or problem.max_rules == 1:  # all columns are known already
        bound = max(bound, least)
    elif gap > _TOLERANCE:
        complete = search.add_all_within(prices, gap)
        if not complete:
            search.add_around(prices)
        choice, least = search.choose()
        bound = least if complete else bound
    if choice is None:
        return None
    return _solution(
        problem, primary, choice.reshape(problem.layers, problem.heads), bound * float(problem.scales[primary])
    )


def evaluate(problem: Problem, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses at each length, and densities at each bounded length, of a choice of rules `[layers, heads]`."""
    layers, heads = np.indices(choice.shape)
    return problem.losses[:, layers, heads, choice].sum((1, 2)), problem.densities[:, choice].mean((1, 2))


def sweep(problem: Problem) -> list[Solution]:
    """Find solutions for several lengths, none worse than another at every length, by the epsilon-constraint method.

    Each length is minimised by itself, which gives a range of losses at each length. Then each length is minimised
    with the losses at the other lengths held below several levels of these ranges. (The public code holds them from
    below too, which only leaves solutions out.) The solutions are sorted by their loss at the first length.

    Raises:
        TaskError: no solution is within the bounds.
    """
    lengths = range(len(problem.losses))
    alone = [solve(problem, primary) for primary in lengths]
    found = [solution for solution in alone if solution is not None]
    if len(found) < len(alone):
        raise TaskError("--density: no schedules keep what they may at every length and what they must; ask for more")
    best, worst = (pick([solution.losses for solution in found], axis=0) for pick in (np.min, np.max))
    levels = _LEVELS.get(len(lengths), _FEW_LEVELS)
    for primary in lengths:
        others = [length for length in lengths if length != primary and worst[length] > best[length]]
        for held in product(levels, repeat=len(others)) if others else ():
            limits = np.full(len(lengths), np.inf)
            limits[others] = best[others] + np.array(held) * (worst[others] - best[others])
            solution = solve(problem, primary, limits.tolist())
            if solution is not None:
                found.append(solution)
    return _pareto(found)


def frontier(problem: Problem, primary: int, bounds: Sequence[float]) -> list[Solution | None]:
    """The solution of smallest loss at one length under each of several bounds on the density, without floors."""
    same = [replace(problem, bounds=np.full_like(problem.bounds, bound), floors=None) for bound in bounds]
    return [solve(one, primary) for one in same]


def _solution(problem: Problem, primary: int, choice: np.ndarray, bound: float) -> Solution:
    losses, densities = evaluate(problem, choice)
    loss = float(losses[primary])
    bound = min(max(bound, 0.0), loss)
    return Solution(choice, losses, densities, bound, (loss - bound) / loss if loss > 0 else 0.0)


def _pareto(solutions: Sequence[Solution]) -> list[Solution]:
    """Drop duplicates and solutions that are worse than another; sort by loss at the first length."""
    single = list({solution.choice.tobytes(): solution for solution in reversed(solutions)}.values())

    def worse(solution: Solution) -> bool:
        return any(
            (other.losses <= solution.losses).all() and (other.losses < solution.losses).any() for other in single
        )

    return sorted(
        (solution for solution in single if not worse(solution)), key=lambda solution: float(solution.losses[0])
    )


@dataclass
class _Search:
    """The columns known so far. Each row is a limit, first on densities and then on losses; losses are scaled.

    Attributes:
        problem: the problem to solve.
        cost: cost of a head's rule, `[layers, heads, rules]`.
        use: what a head's rule uses of each row, `[rows, layers, heads, rules]`.
        room: limit of each row.
        columns: columns of each layer (the rules of its heads), in the order in which they were added.
    """

    problem: Problem
    cost: np.ndarray
    use: np.ndarray
    room: np.ndarray
    columns: list[dict[tuple[int, ...], None]] = field(default_factory=list)

    @classmethod
    def of(cls, problem: Problem, primary: int, limits: Sequence[float] | None) -> "_Search":
        scaled = problem.losses / problem.scales[:, None, None, None]
        shape = (len(problem.bounds), problem.layers, problem.heads, problem.rules)
        share = problem.densities[:, None, None, :] / (problem.layers * problem.heads)
        use, room = [np.broadcast_to(share, shape)], [problem.bounds]
        if problem.floors is not None:
            use.append(-use[0])
            room.append(-problem.floors)
        if limits is not None:
            held = [length for length, limit in enumerate(limits) if np.isfinite(limit)]
            use.append(scaled[held])
            room.append(np.asarray(limits, dtype=float)[held] / problem.scales[held])
        columns: list[dict[tuple[int, ...], None]] = [{} for _ in range(problem.layers)]
        return cls(problem, scaled[primary], np.concatenate(use), np.concatenate(room), columns)

    def add_uniform(self) -> None:
        """Add the columns with one rule for all heads of a layer, so that the search starts with feasible columns."""
        for layer in self.columns:
            layer.update({(rule,) * self.problem.heads: None for rule in range(self.problem.rules)})

    def generate(self) -> tuple[float, np.ndarray]:
        """Add columns until none pays; return a lower bound, and the row prices that give it."""
        best, prices = -np.inf, np.zeros(len(self.room))
        while True:
            value, row_prices, layer_prices = self._linear()
            layers, reduced = self._cheapest(self.cost - np.tensordot(row_prices, self.use, 1))
            gains = reduced - layer_prices
            bound = value + float(gains.sum())
            if bound > best:
                best, prices = bound, row_prices
            new = [layer for layer, gain in enumerate(gains) if gain < -_TOLERANCE]
            fresh = [layer for layer in new if layers[layer] not in self.columns[layer]]
            for layer in fresh:
                self.columns[layer][layers[layer]] = None
            if not fresh:
                return best, prices

    def choose(self) -> tuple[np.ndarray | None, float]:
        """The best solution made of the columns, `[layers, heads]`, and a lower bound on all such solutions.

        The solution is None if none of them is within the limits.
        """
        cost, use, layer = self._arrays()
        of_layer = np.arange(self.problem.layers)[:, None] == layer
        limits = [
            optimize.LinearConstraint(use, ub=self.room + _TOLERANCE),
            optimize.LinearConstraint(of_layer.astype(float), 1, 1),
        ]
        options = {"time_limit": _SECONDS, "mip_rel_gap": 1e-6}
        found = optimize.milp(cost, constraints=limits, integrality=np.ones(len(cost)), bounds=(0, 1), options=options)
        if found.x is None:
            return None, np.inf
        rows = [list(columns)[int(found.x[layer == number].argmax())] for number, columns in enumerate(self.columns)]
        return np.array(rows), float(found.mip_dual_bound)

    def add_all_within(self, prices: np.ndarray, gap: float) -> bool:
        """Add every column that a solution within `gap` of the bound can have; return False if they are too many."""
        if self.problem.rules**self.problem.heads > _MOST_ASSIGNMENTS:
            return False
        reduced = self.cost - np.tensordot(prices, self.use, 1)
        added: list[np.ndarray] = []
        for layer in reduced:
            values = layer[0]
            for head in layer[1:]:
                values = values[..., None] + head
            values = np.where(self._allowed, values, np.inf)
            added.append(np.argwhere(np.isfinite(values) & (values - values.min() <= gap + _TOLERANCE)))
        if sum(map(len, added)) > _MOST_COLUMNS:
            return False
        for columns, rows in zip(self.columns, added, strict=True):
            columns.update({tuple(row): None for row in rows.tolist()})
        return True

    def add_around(self, prices: np.ndarray) -> None:
        """Add the best columns of many sets of rules, at somewhat higher and lower prices."""
        sets = self.problem.sets
        assert sets is not None, "without sets all columns are there"
        for factor in _AROUND:
            price = self.cost - np.tensordot(factor * prices, self.use, 1)
            for columns, layer in zip(self.columns, price, strict=True):
                of_sets = layer[:, sets]
                for best in of_sets.min(-1).sum(0).argsort()[:_EACH]:
                    columns[tuple(sets[best][of_sets[:, best].argmin(-1)].tolist())] = None

    def value(self, choice: np.ndarray) -> float:
        """The scaled loss that is minimised."""
        return float(np.take_along_axis(self.cost, choice[..., None], 2).sum())

    @cached_property
    def _allowed(self) -> np.ndarray:
        """Which assignments of a layer have at most `max_rules` rules, `[rules] * heads`."""
        chosen = np.sort(np.indices((self.problem.rules,) * self.problem.heads), 0)
        return 1 + (np.diff(chosen, axis=0) > 0).sum(0) <= (self.problem.max_rules or self.problem.heads)

    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The cost `[n]`, the use of each row `[rows, n]` and the layer `[n]` of each column."""
        heads = np.arange(self.problem.heads)
        costs, uses = [], []
        for layer, columns in enumerate(self.columns):
            rules = np.array(list(columns))
            costs.append(self.cost[layer, heads, rules].sum(-1))
            uses.append(self.use[:, layer][:, heads, rules].sum(-1))
        number = [len(columns) for columns in self.columns]
        return np.concatenate(costs), np.concatenate(uses, 1), np.repeat(np.arange(len(number)), number)

    def _linear(self) -> tuple[float, np.ndarray, np.ndarray]:
        """Solve the linear program over the columns; return its value, and the prices of rows (at most 0) and layers.

        A row may be exceeded at a penalty, so there is always a solution.
        """
        cost, use, layer = self._arrays()
        rows = len(self.room)
        found = optimize.linprog(
            np.concatenate([cost, np.full(rows, _PENALTY)]),
            A_ub=np.concatenate([use, -np.eye(rows)], 1),
            b_ub=self.room,
            A_eq=np.concatenate(
                [np.arange(self.problem.layers)[:, None] == layer, np.zeros((self.problem.layers, rows))], 1
            ),
            b_eq=np.ones(self.problem.layers),
            method="highs",
        )
        return float(found.fun), found.ineqlin.marginals, found.eqlin.marginals

    def _cheapest(self, price: np.ndarray) -> tuple[list[tuple[int, ...]], np.ndarray]:
        """The best column of each layer at the prices `[layers, heads, rules]`, and its cost."""
        sets = self.problem.sets
        if sets is None:
            return [tuple(rules) for rules in price.argmin(-1).tolist()], price.min(-1).sum(-1)
        columns, costs = [], []
        for layer in price:
            of_sets = layer[:, sets]  # [heads, sets, max_rules]
            best = int(of_sets.min(-1).sum(0).argmin())
            columns.append(tuple(sets[best][of_sets[:, best].argmin(-1)].tolist()))
            costs.append(of_sets[:, best].min(-1).sum())
        return columns, np.array(costs)
