"""The whole search: measure, choose, write."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import RenderableType
from rich.text import Text
from transformers import PreTrainedModel

from sparse_patch.artefacts.layer_roles import Calibration as Artefact
from sparse_patch.artefacts.layer_roles import Roles, write_calibration
from sparse_patch.calibration.base import Calibration, shape_of
from sparse_patch.calibration.layers.choose import Choice, Curves, check_number, choose
from sparse_patch.calibration.layers.measure import MATRICES, Measured, measure, samples_of
from sparse_patch.calibration.layers.table import measured_of, prompts_of, summary, table
from sparse_patch.model_shape import ModelShape
from sparse_patch.workbench.journal import Journal
from sparse_patch.workbench.progress import Step


class Found(NamedTuple):
    """The result of a search.

    Attributes:
        measured: the measurements of each prompt.
        curves: the means of the measurements.
        choice: the chosen layers.
    """

    measured: list[Measured]
    curves: Curves
    choice: Choice


@dataclass(frozen=True)
class LayersCalibration(Calibration[Found]):
    """The search for selecting layers, from the attention of the answers to a few long prompts.

    Attributes:
        length: tokens of the prompts.
        samples: number of prompts, of five tasks in turn.
        seed: determines everything random.
        budget: number of tokens that a sparse layer reads.
        select: number of layers that select again after the first selecting layer.
    """

    name = "layers"
    record = Measured
    makes = "layers"
    used_by = "decode.calibration"

    length: int = 8192
    samples: int = 5
    seed: int = 0
    budget: int = 512
    select: int = 1

    @property
    def measured(self) -> dict[str, Any]:
        return {"length": self.length, "seed": self.seed, "budget": self.budget}

    def steps(self, shape: ModelShape) -> int:
        return self.samples

    def search(self, model: PreTrainedModel, tokenizer: Any, journal: Journal[Any], progress: Step) -> Found:
        check_number(self.select, shape_of(model).num_layers)
        prompts = samples_of(tokenizer, self.length, self.samples, self.seed)
        measured = measure(model, tokenizer, prompts, self.budget, journal, progress)
        curves = Curves.of(measured)
        return Found(measured, curves, choose(curves, self.select))

    def table(self, found: Found) -> list[RenderableType]:
        return [table(found.curves, found.choice, self.length, self.budget), Text(summary(found.choice))]

    def write(self, path: Path, found: Found, shape: ModelShape, model_id: str) -> None:
        roles = Roles(full=found.choice.full, select=found.choice.select)
        write_calibration(path, Artefact(self.header(shape, model_id), roles), measured_of(found.curves, found.choice))

    def as_json(self, found: Found, shape: ModelShape, model_id: str) -> dict[str, Any]:
        """The choice, the curve, the matrices, and the mass that each prompt showed."""
        curves, choice = found.curves, found.choice
        settings = {key: value for key, value in asdict(self).items() if key != "select"}
        return {
            "model": {name: getattr(shape, name) for name in ("model_type", "num_layers", "num_heads", "hidden_size")},
            "full": choice.full,
            "select": choice.select,
            "measured": {"model": model_id, **settings, **measured_of(curves, choice)},
            "layers": curves.layers,
            **{name: [[round(x, 5) for x in row] for row in getattr(curves, name).tolist()] for name in MATRICES},
            "jumps": curves.jumps,
            "prompts": prompts_of(found.measured),
        }
