"""The choice of selecting layers from the measurements of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
import torch

from sparse_patch.calibration.layers.measure import MATRICES, Measured
from sparse_patch.errors import TaskError

FULL = 2  # number of first layers that stay dense and select nothing
_MOST_SETS = 20_000  # most sets to try one by one; if there are more, layers are chosen greedily


@dataclass(frozen=True)
class Curves:
    """The means over all prompts; the attributes are those of `Measured`."""

    layers: list[int]
    far: list[float]
    mass_per_head: torch.Tensor
    mass_shared: torch.Tensor
    overlap_per_head: torch.Tensor
    overlap_shared: torch.Tensor
    jumps: list[float]

    @classmethod
    def of(cls, measured: Sequence[Measured]) -> "Curves":
        def mean(name: str) -> torch.Tensor:
            return torch.tensor([getattr(one, name) for one in measured], dtype=torch.float64).mean(0)

        far, jumps = mean("far").tolist(), mean("jumps").tolist()
        return cls(measured[0].layers, far, **{name: mean(name) for name in MATRICES}, jumps=jumps)

    @property
    def mass(self) -> torch.Tensor:
        """The mean mass of both kinds of lists, `[selecting layer, layer]`."""
        return (self.mass_per_head + self.mass_shared) / 2


@dataclass(frozen=True)
class Choice:
    """The chosen layers, by their index in the model.

    Attributes:
        full: layers that are dense and select nothing.
        select: layers that are dense and select for the sparse layers after them.
        mass: share of the sparse layers' attention to far tokens that lies on their lists.
        worst: share of all its attention that the sparse layer keeps which loses most.
    """

    full: list[int]
    select: list[int]
    mass: float
    worst: float


def choose(curves: Curves, reselect: int, full: int = FULL) -> Choice:
    """Choose: the first `full` layers are dense, the next one selects, and the best `reselect` layers after it select.

    The last layer is no candidate, because no layer follows it. Layers that cannot run sparse attention do not count.

    Raises:
        TaskError: there are not enough layers.
    """
    candidates = candidates_of(curves, full)
    check_number(reselect, len(curves.layers), full)
    if comb(len(candidates), reselect) <= _MOST_SETS:
        sets = combinations(candidates, reselect)
        return max((choice_of(curves, full, chosen) for chosen in sets), key=lambda choice: choice.mass)
    best, chosen = choice_of(curves, full, ()), list[int]()
    for _ in range(reselect):
        left = [layer for layer in candidates if layer not in chosen]
        trials = {layer: choice_of(curves, full, sorted([*chosen, layer])) for layer in left}
        chosen.append(max(trials, key=lambda layer: trials[layer].mass))
        best = trials[chosen[-1]]
    return best


def check_number(reselect: int, layers: int, full: int = FULL) -> None:
    """Raise TaskError if a model of `layers` layers has fewer than `reselect` candidates; called before the search."""
    left = max(0, layers - full - 2)
    if reselect > left:
        raise TaskError(f"--select: the model has {left} layers to choose from, not {reselect}")


def choice_of(curves: Curves, full: int, reselect: Sequence[int]) -> Choice:
    """A choice of layers, with what its sparse layers find. `reselect`: ascending indices into `curves.layers`."""
    select = [full, *reselect]
    mass = curves.mass
    sparse = [layer for layer in range(full + 1, len(curves.layers)) if layer not in select]
    found = [float(mass[max(chosen for chosen in select if chosen < layer), layer]) for layer in sparse]
    names = curves.layers
    far = [curves.far[layer] for layer in sparse]
    kept = [1 - share * (1 - part) for part, share in zip(found, far, strict=True)]
    mean = float(np.average(found, weights=far))
    return Choice(names[:full], [names[layer] for layer in select], mean, min(kept))


def candidates_of(curves: Curves, full: int) -> range:
    number, least = len(curves.layers), full + 2
    if number < least:
        raise TaskError(f"--model: {number} of its layers can run sparse attention; a search needs {least}")
    return range(full + 1, number - 1)
