"""Plans to choose from, and what they have to beat."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from sparse_patch.calibration.moa.influence import BLOCK
from sparse_patch.calibration.moa.optimise import Problem, Solution, frontier, solve, sweep
from sparse_patch.calibration.moa.records import Profiled, Settings
from sparse_patch.calibration.moa.rules import FULL, Rule, densities, losses, rules_for
from sparse_patch.methods.span_plans import SpanRules, duo_rules
from sparse_patch.model_shape import ModelShape

STREAMING = 320  # tokens that a streaming head of DuoAttention keeps: 64 first and 256 last ones
BOUNDS = tuple(tenth / 10 for tenth in range(1, 10))  # densities of the frontier


@dataclass(frozen=True)
class Candidate:
    """A plan, or a baseline.

    Attributes:
        name: of it.
        rules: what it is.
        predicted: what it loses by the influence at each profiled length.
        densities: share of the KV entries that it keeps in the searched layers, at each profiled length and the unseen.
        gap: what a plan may be worse than the best one at the length it was made for, relative; None for a baseline.
        loss: mean cross-entropy at the unseen length; None if it was not validated.
    """

    name: str
    rules: SpanRules
    predicted: list[float]
    densities: list[float]
    gap: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Profile:
    """What the prompts showed, and the plans that follow from it.

    Attributes:
        settings: of the search.
        shape: of the model.
        layers: with full attention; the others keep everything and do not count.
        curves: mean influence at each profiled length, `[layers, KV heads, blocks]`.
    """

    settings: Settings
    shape: ModelShape
    layers: list[int]
    curves: dict[int, np.ndarray]

    @classmethod
    def of(cls, settings: Settings, shape: ModelShape, measured: Sequence[Profiled]) -> "Profile":
        curves = {
            length: np.mean([getattr(one, settings.influence) for one in measured if one.length == length], axis=0)
            for length in settings.lengths
        }
        return cls(settings, shape, measured[0].layers, curves)

    @property
    def bounded(self) -> list[int]:
        """The lengths at which the density is bounded."""
        return [*self.settings.lengths, self.settings.unseen]

    @property
    def longest(self) -> int:
        """The longest profiled length."""
        return max(self.settings.lengths)

    def candidate(self, name: str, plan: SpanRules, gap: float | None = None) -> Candidate:
        """A plan with what it loses and keeps."""
        lost = [self.lost(plan, length) for length in self.settings.lengths]
        return Candidate(name, plan, lost, [plan.density(length, self.layers) for length in self.bounded], gap)

    def lost(self, plan: SpanRules, length: int) -> float:
        """What a plan loses at a length by the influence there."""
        curves, total = self.curves[length], 0.0
        for number, layer in enumerate(self.layers):
            for head, kept in enumerate(plan.kept(layer, length)):
                window = (kept - plan.sink) // BLOCK
                if kept < length and window < curves.shape[2]:
                    total += float(curves[number, head, window])
        return total

    def plans(self) -> list[Candidate]:
        """Plans within the density of which none loses more than another at every length, by loss at the first.

        Raises:
            TaskError: there is none.
        """
        rules, problem = self._problem()
        return [
            self.candidate(f"plan {number}", self._plan(rules, one), round(one.gap, 5))
            for number, one in enumerate(sweep(problem))
        ]

    def baselines(self, chosen: SpanRules) -> list[Candidate]:
        """What a plan's choice of heads has to beat, at as many tokens at the unseen length, or nearly.

        One span for all heads; the plan's rules dealt to the heads at random; DuoAttention's two rules, full for the
        heads whose far keys have most influence; and the best plan with one rule a layer.
        """
        share = chosen.density(self.settings.unseen, self.layers)
        rules = [
            Rule(*rule) for layer in self.layers for rule in zip(chosen.alphas[layer], chosen.betas[layer], strict=True)
        ]
        found = [
            self.candidate("one span", self._with([Rule(0.0, share)] * len(rules))),
            self.candidate("dealt at random", self._with(Random(self.settings.seed).sample(rules, len(rules)))),
            self.candidate("full or streaming", self._duo(share, self.settings.unseen)),
        ]
        by_layer, problem = self._problem()
        single = solve(replace(problem, max_rules=1), self.settings.lengths.index(self.longest))
        if single is not None:
            found.append(self.candidate("a rule a layer", self._plan(by_layer, single)))
        return found

    def frontier(self) -> dict[str, list[float | None]]:
        """For densities, what the best plan and two baselines lose at the longest profiled length."""
        length, heads = self.longest, len(self.layers) * self.shape.num_kv_heads
        rules, problem = self._problem()
        best = frontier(problem, self.settings.lengths.index(length), BOUNDS)
        return {
            "density": list(BOUNDS),
            "plan": [None if one is None else self.lost(self._plan(rules, one), length) for one in best],
            "one span": [self.lost(self._with([Rule(0.0, bound)] * heads), length) for bound in BOUNDS],
            "full or streaming": [self.lost(self._duo(bound, length), length) for bound in BOUNDS],
        }

    def _problem(self) -> tuple[list[Rule], Problem]:
        lengths = self.settings.lengths
        rules = rules_for(lengths, self.bounded)
        of_rules = np.stack([losses(self.curves[length], rules, length) for length in lengths])
        bounds = np.full(len(self.bounded), self.settings.density)
        return rules, Problem(of_rules, densities(rules, self.bounded), bounds, self.settings.max_rules)

    def _plan(self, rules: Sequence[Rule], solution: Solution) -> SpanRules:
        return self._with([rules[number] for number in solution.choice.flatten().tolist()])

    def _with(self, rules: Sequence[Rule]) -> SpanRules:
        """A plan with these rules in the heads of the searched layers, one layer after another."""
        heads = self.shape.num_kv_heads
        of_layers = [[FULL] * heads for _ in range(self.shape.num_layers)]
        for number, layer in enumerate(self.layers):
            of_layers[layer] = list(rules[number * heads : (number + 1) * heads])
        return SpanRules.of(
            self.shape,
            [[rule.alpha for rule in row] for row in of_layers],
            [[rule.beta for rule in row] for row in of_layers],
        )

    def _duo(self, share: float, length: int) -> SpanRules:
        """DuoAttention's two rules, with as many full heads as come nearest to a density at a length."""
        curves, heads = self.curves[self.longest], self.shape.num_kv_heads
        influence = curves[:, :, min((STREAMING - BLOCK) // BLOCK, curves.shape[2] - 1)]
        least = STREAMING / length
        number = round(max(0.0, (share - least) / (1 - least)) * influence.size)
        ranked = np.argsort(-influence, axis=None, kind="stable")[:number].tolist()
        full = {(self.layers[at // heads], at % heads) for at in ranked}
        others = set(range(self.shape.num_layers)) - set(self.layers)
        return duo_rules(
            self.shape, full | {(layer, head) for layer in others for head in range(heads)}, BLOCK, STREAMING - BLOCK
        )
