"""What the calibrations have in common: a search with a journal, a table of what it found, and an artefact."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from rich.console import RenderableType
from transformers import PreTrainedModel

from sparse_patch.artefacts.base import Header
from sparse_patch.model_shape import ModelShape
from sparse_patch.workbench.journal import Journal
from sparse_patch.workbench.progress import Step

Found = TypeVar("Found")


class Calibration(ABC, Generic[Found]):
    """A search with its settings, a frozen dataclass: what `sparse-patch calibrate NAME` runs.

    Attributes:
        name: the NAME, and the kind of the artefact.
        record: what the journal keeps: a dataclass with a `key`, or a union of them.
        makes: what the artefact holds, in a word or two.
        used_by: the setting of a configuration that names the artefact.
    """

    name: ClassVar[str]
    record: ClassVar[Any]
    makes: ClassVar[str]
    used_by: ClassVar[str]

    @property
    def settings(self) -> dict[str, Any]:
        """What the artefact is made with, as JSON has it."""
        return dict(json.loads(json.dumps(asdict(self))))  # type: ignore[call-overload]

    @property
    def measured(self) -> dict[str, Any]:
        """The settings that the records of the journal depend on, as JSON has them."""
        return self.settings

    def check(self) -> None:
        """Raise SparsePatchError for what is wrong with the settings whatever the model is."""

    def journal(self, path: Path, model_id: str) -> Journal[Any]:
        """The journal beside the artefact that is to be written; see `Journal`."""
        return Journal.beside(path, {"model": model_id, **self.measured}, self.record, "--out")

    def header(self, shape: ModelShape, model_id: str) -> Header:
        """The header of the artefact."""
        return Header.of(self.name, shape, self.settings, model_id)

    @abstractmethod
    def steps(self, shape: ModelShape) -> int:
        """Steps of a whole search, for its progress."""

    @abstractmethod
    def search(self, model: PreTrainedModel, tokenizer: Any, journal: Journal[Any], progress: Step) -> Found:
        """Search; what the journal has is not measured again.

        Args:
            model: not patched; it is left so.
            tokenizer: the model's.
            journal: gets everything as it is measured.
            progress: called with a description before each step.

        Raises:
            PatchError: the model is patched already, or cannot be.
            TaskError: a setting does not fit the model, or no layer of it can run sparse attention.
        """

    @abstractmethod
    def table(self, found: Found) -> Sequence[RenderableType]:
        """What was found, to print."""

    @abstractmethod
    def write(self, path: Path, found: Found, shape: ModelShape, model_id: str) -> None:
        """Write the artefact, in place of an older file at once."""

    def as_json(self, found: Found, shape: ModelShape, model_id: str) -> dict[str, Any]:
        """What was found, as JSON has it; of calibrations that give no more only the header."""
        return self.header(shape, model_id).entry()


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a model with all its layers."""
    return ModelShape.of(model.config, model.config.get_text_config(decoder=True).num_hidden_layers)
