"""The result of a search, as tables and as JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from sparse_patch.calibration.moa.candidates import Candidate, Profile
from sparse_patch.calibration.moa.schedules import Rule


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        profile: the measurements of the prompts.
        dense: mean cross-entropy of the dense model at the unseen length.
        plans: the schedules found, sorted by predicted loss at the first length.
        baselines: the baselines of the chosen schedules.
        chosen: the schedules with the least validated loss.
    """

    profile: Profile
    dense: float
    plans: list[Candidate]
    baselines: list[Candidate]
    chosen: Candidate


def table(found: Found) -> Table:
    """A table with one line per candidate: what it keeps, its predicted loss, and its loss at the unseen length."""
    settings = found.profile.settings
    drawn = Table(
        title=f"schedules within a density of {settings.density:g}; "
        f"cross-entropy of answers at {settings.unseen} tokens, dense {found.dense:.4f}",
        title_justify="left",
        box=box.SIMPLE,
    )
    bounded = found.profile.bounded
    for column in ("", *(f"density {n}" for n in bounded), *(f"influence {n}" for n in bounded), "loss", ""):
        drawn.add_column(column, justify="right", no_wrap=not column)
    for one in (*found.plans, *found.baselines):
        numbers = [*(f"{x:.3f}" for x in one.densities), *(f"{x:.4g}" for x in one.predicted)]
        loss = "" if one.loss is None else f"{one.loss:.4f}"
        drawn.add_row(one.name, *numbers, loss, "<- chosen" if one.name == found.chosen.name else "")
    return drawn


def spans_table(found: Found) -> Table:
    """The chosen schedules, one line per layer: each KV head's rule, and the tokens it keeps at the longest length."""
    length, rules = found.profile.longest, found.chosen.rules
    drawn = Table(title=f"spans of {found.chosen.name} at {length} tokens", title_justify="left", box=box.SIMPLE)
    for column in ("layer", *(f"head {head}" for head in range(rules.num_kv_heads))):
        drawn.add_column(column, justify="right")
    for layer in found.profile.layers:
        row = zip(rules.alphas[layer], rules.betas[layer], rules.kept(layer, length), strict=True)
        drawn.add_row(str(layer), *(f"{min(kept, length)} = {Rule(alpha, beta)}" for alpha, beta, kept in row))
    return drawn


def as_json(found: Found) -> dict[str, Any]:
    """The whole result: settings, schedules, baselines, the influence, and the chosen spans at every length."""
    profile, rules = found.profile, found.chosen.rules

    def plain(one: Candidate) -> dict[str, Any]:
        return {**vars(one), "rules": one.rules.model_dump(exclude={"header": {"settings"}, "measured": True})}

    return {
        "settings": asdict(profile.settings),
        "validate_length": profile.settings.unseen,
        "layers": profile.layers,
        "dense": found.dense,
        "chosen": found.chosen.name,
        "plans": [plain(one) for one in found.plans],
        "baselines": [plain(one) for one in found.baselines],
        "spans": {
            str(length): [[min(kept, length) for kept in rules.kept(layer, length)] for layer in profile.layers]
            for length in profile.bounded
        },
        "frontier": profile.frontier(),
        "curves": {str(length): curve.tolist() for length, curve in profile.curves.items()},
    }
