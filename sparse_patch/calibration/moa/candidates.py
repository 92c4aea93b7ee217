"""The head schedules to choose from, and the baselines that they must beat."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from sparse_patch.artefacts.head_schedules import HeadSchedules, duo_schedules
from sparse_patch.calibration.moa.influence import BLOCK
from sparse_patch.calibration.moa.optimise import Problem, Solution, frontier, solve, sweep
from sparse_patch.calibration.moa.records import Profiled, Settings
from sparse_patch.calibration.moa.schedules import FULL, STREAMING, Rule, densities, losses, schedules_for
from sparse_patch.model_shape import ModelShape

LEAST = 0.9  # least share of the allowed density that schedules keep at every length, as in the public code
BOUNDS = tuple(tenth / 10 for tenth in range(1, 10))  # densities of the frontier


@dataclass(frozen=True)
class Candidate:
    """Head schedules that the search found, or a baseline.

    Attributes:
        name: name of the candidate.
        rules: its head schedules.
        predicted: predicted loss, by the influence, at each profiled length and at the unseen length.
        densities: share of the KV entries kept in the searched layers, at each profiled length and the unseen length.
        gap: how much worse than the best schedules it can be, relative, at the length it was optimised for; None for a
            baseline.
        loss: mean cross-entropy at the unseen length; None if it was not validated.
    """

    name: str
    rules: HeadSchedules
    predicted: list[float]
    densities: list[float]
    gap: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Profile:
    """The measurements of the prompts, and the schedules that follow from them.

    Attributes:
        settings: settings of the search.
        shape: shape of the model.
        layers: indices of the layers with full attention. The other layers keep all keys and do not count.
        curves: mean influence at each profiled length, `[layers, KV heads, blocks]`, and at the unseen length, where it
            is extrapolated; see `stretched`.
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
        longest = max(settings.lengths)
        curves[settings.unseen] = stretched(curves[longest], settings.unseen / longest)
        return cls(settings, shape, measured[0].layers, curves)

    @property
    def bounded(self) -> list[int]:
        """The lengths at which the density is bounded."""
        return [*self.settings.lengths, self.settings.unseen]

    @property
    def longest(self) -> int:
        """The longest profiled length."""
        return max(self.settings.lengths)

    def candidate(self, name: str, schedules: HeadSchedules, gap: float | None = None) -> Candidate:
        """Make a candidate of schedules, with what they lose and keep."""
        lost = [self.lost(schedules, length) for length in self.bounded]
        return Candidate(
            name, schedules, lost, [schedules.density(length, self.layers) for length in self.bounded], gap
        )

    def lost(self, schedules: HeadSchedules, length: int) -> float:
        """The predicted loss of schedules at a length, by the influence there."""
        curves, total = self.curves[length], 0.0
        for number, layer in enumerate(self.layers):
            for head, kept in enumerate(schedules.kept(layer, length)):
                window = (kept - schedules.sink) // BLOCK
                if kept < length and window < curves.shape[2]:
                    total += float(curves[number, head, window])
        return total

    def plans(self) -> list[Candidate]:
        """Schedules within the density, none worse than another at every length, sorted by loss at the first length.

        Raises:
            TaskError: no schedules are within the density.
        """
        rules, problem = self._problem()
        return [
            self.candidate(f"plan {number}", self._schedules(rules, one), round(one.gap, 5))
            for number, one in enumerate(sweep(problem))
        ]

    def baselines(self, chosen: HeadSchedules) -> list[Candidate]:
        """The baselines that chosen schedules must beat, with about as many tokens kept at the unseen length.

        The baselines are: one span for all heads; the chosen rules, assigned to the heads at random; DuoAttention's two
        rules, with the full rule for the heads whose far keys have most influence; and the best schedules with one rule
        per layer.
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
            found.append(self.candidate("a rule a layer", self._schedules(by_layer, single)))
        return found

    def frontier(self) -> dict[str, list[float | None]]:
        """What the best schedules and two baselines lose at several densities, at the longest profiled length."""
        length, heads = self.longest, len(self.layers) * self.shape.num_kv_heads
        rules, problem = self._problem()
        best = frontier(problem, self.settings.lengths.index(length), BOUNDS)
        return {
            "density": list(BOUNDS),
            "plan": [None if one is None else self.lost(self._schedules(rules, one), length) for one in best],
            "one span": [self.lost(self._with([Rule(0.0, bound)] * heads), length) for bound in BOUNDS],
            "full or streaming": [self.lost(self._duo(bound, length), length) for bound in BOUNDS],
        }

    def _problem(self) -> tuple[list[Rule], Problem]:
        rules = schedules_for(self.settings.lengths, self.bounded)
        of_rules = np.stack([losses(self.curves[length], rules, length) for length in self.bounded])
        bounds = np.full(len(self.bounded), self.settings.density)
        return rules, Problem(of_rules, densities(rules, self.bounded), bounds, self.settings.max_rules, LEAST * bounds)

    def _schedules(self, rules: Sequence[Rule], solution: Solution) -> HeadSchedules:
        return self._with([rules[number] for number in solution.choice.flatten().tolist()])

    def _with(self, rules: Sequence[Rule]) -> HeadSchedules:
        """Schedules with these rules for the heads of the searched layers, layer by layer."""
        heads = self.shape.num_kv_heads
        of_layers = [[FULL] * heads for _ in range(self.shape.num_layers)]
        for number, layer in enumerate(self.layers):
            of_layers[layer] = list(rules[number * heads : (number + 1) * heads])
        return HeadSchedules.of(
            self.shape,
            [[rule.alpha for rule in row] for row in of_layers],
            [[rule.beta for rule in row] for row in of_layers],
        )

    def _duo(self, share: float, length: int) -> HeadSchedules:
        """DuoAttention's two rules, with the number of full heads that comes nearest to a density at a length."""
        curves, heads = self.curves[self.longest], self.shape.num_kv_heads
        recent = STREAMING.kept(length) - BLOCK
        influence = curves[:, :, min(recent // BLOCK, curves.shape[2] - 1)]
        least = STREAMING.kept(length) / length
        number = round(max(0.0, (share - least) / (1 - least)) * influence.size)
        ranked = np.argsort(-influence, axis=None, kind="stable")[:number].tolist()
        full = {(self.layers[at // heads], at % heads) for at in ranked}
        others = set(range(self.shape.num_layers)) - set(self.layers)
        return duo_schedules(
            self.shape, full | {(layer, head) for layer in others for head in range(heads)}, BLOCK, recent
        )


def stretched(curves: np.ndarray, factor: float) -> np.ndarray:
    """Curves stretched to another length, as if the distance of what a head needs grew in proportion to the length.

    They are needed because a rule such as `1024 + 0.75 N` keeps everything at a length of 4096 and less at any longer
    one, which no measured length shows.
    """
    blocks = np.arange(round(curves.shape[2] * factor))
    return curves[:, :, np.minimum((blocks / factor).astype(int), curves.shape[2] - 1)]
