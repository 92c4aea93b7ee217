"""The results of the search for selecting layers, as tables and plain data."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from sparse_patch.calibration.layers.choose import FULL, Choice, Curves, candidates_of, choice_of
from sparse_patch.calibration.layers.measure import PROMPTS, Measured


def curve(curves: Curves, full: int = FULL) -> Iterator[dict[str, Any]]:
    """Yield, as plain data, what each layer would be worth as the only re-selecting layer, and its jump."""
    for layer in candidates_of(curves, full):
        choice = choice_of(curves, full, [layer])
        nearest = [full if other < layer else layer for other in range(len(curves.layers))]
        sparse = [other for other in range(full + 1, len(curves.layers)) if other != layer]

        def mean(matrix: torch.Tensor, nearest: list[int] = nearest, sparse: list[int] = sparse) -> float:
            found = [float(matrix[nearest[other], other]) for other in sparse]
            return round(float(np.average(found, weights=[curves.far[other] for other in sparse])), 4)

        yield {
            "layer": curves.layers[layer],
            "mass": round(choice.mass, 4),
            "mass_per_head": mean(curves.mass_per_head),
            "mass_shared": mean(curves.mass_shared),
            "worst_layer": round(choice.worst, 4),
            "overlap_per_head": mean(curves.overlap_per_head),
            "overlap_shared": mean(curves.overlap_shared),
            "jump": round(curves.jumps[layer], 4),
        }


def table(curves: Curves, choice: Choice, length: int, budget: int) -> Table:
    """The curve as a table: one line per layer that may select again, with the chosen layers marked."""
    title = f"what sparse layers find with one re-selecting layer: {length} tokens, {budget} kept"
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE)
    for column in (
        *("re-selecting layer", "mass", "lists per head", "one list", "worst layer"),
        *("overlap per head", "overlap, one list", "1 - cos", ""),
    ):
        drawn.add_column(column, justify="right")
    for row in curve(curves):
        layer, *values = row.values()
        chosen = "<- chosen" if layer in choice.select else ""
        drawn.add_row(str(layer), *(f"{value:.3f}" for value in values), chosen)
    return drawn


def summary(choice: Choice) -> str:
    """The choice, in one line."""
    return (
        f"full {choice.full}, select {choice.select}: of the attention of sparse layers to far tokens their lists hold "
        f"{choice.mass:.3f}; the worst layer keeps {choice.worst:.3f} of all its attention"
    )


def measured_of(curves: Curves, choice: Choice) -> dict[str, Any]:
    """What a choice finds, and what every candidate would find, as plain data."""
    return {"mass": round(choice.mass, 4), "worst_layer": round(choice.worst, 4), "candidates": list(curve(curves))}


def prompts_of(measured: Sequence[Measured]) -> dict[str, list[dict[str, Any]]]:
    """Name of each prompt -> the mass of each candidate layer on it, as plain data."""
    return {
        f"{one.task} {one.sample // len(PROMPTS)}": [
            {"layer": row["layer"], "mass": row["mass"]} for row in curve(Curves.of([one]))
        ]
        for one in measured
    }
