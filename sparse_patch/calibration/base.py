"""The base class of the calibrations: a search with a journal, a table of its results, and an artefact."""

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
    """A search and its settings, as a frozen dataclass; `sparse-patch calibrate NAME` runs it.

    Attributes:
        name: the NAME of the command, and the kind of the artefact.
        record: type of the journal's records: a dataclass with a `key`, or a union of such dataclasses.
        makes: the artefact's content, in a word or two.
        used_by: the setting of a configuration that names the artefact.
    """

    name: ClassVar[str]
    record: ClassVar[Any]
    makes: ClassVar[str]
    used_by: ClassVar[str]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the artefact is made with, as JSON values."""
        return dict(json.loads(json.dumps(asdict(self))))  # type: ignore[call-overload]

    @property
    def measured(self) -> dict[str, Any]:
        """The settings that the journal's records depend on, as JSON values."""
        return self.settings

    def check(self) -> None:
        """Raise SparsePatchError if the settings are wrong for every model."""

    def journal(self, path: Path, model_id: str) -> Journal[Any]:
        """The journal beside the artefact file; see `Journal`."""
        return Journal.beside(path, {"model": model_id, **self.measured}, self.record, "--out")

    def header(self, shape: ModelShape, model_id: str) -> Header:
        """The header of the artefact."""
        return Header.of(self.name, shape, self.settings, model_id)

    @abstractmethod
    def steps(self, shape: ModelShape) -> int:
        """Number of steps of a whole search, for its progress."""

    @abstractmethod
    def search(self, model: PreTrainedModel, tokenizer: Any, journal: Journal[Any], progress: Step) -> Found:
        """Search. Records that the journal already has are not measured again.

        Args:
            model: an unpatched model; it is unpatched afterwards too.
            tokenizer: the model's.
            journal: each measurement is added to it.
            progress: called with a description before each step.

        Raises:
            PatchError: the model is already patched, or cannot be patched.
            TaskError: a setting does not fit the model, or no layer of the model can run sparse attention.
        """

    @abstractmethod
    def table(self, found: Found) -> Sequence[RenderableType]:
        """The result, to print."""

    @abstractmethod
    def write(self, path: Path, found: Found, shape: ModelShape, model_id: str) -> None:
        """Write the artefact; an older file is replaced atomically."""

    def as_json(self, found: Found, shape: ModelShape, model_id: str) -> dict[str, Any]:
        """The result as JSON values; by default only the artefact's header."""
        return self.header(shape, model_id).entry()


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a model with all its layers."""
    return ModelShape.of(model.config, model.config.get_text_config(decoder=True).num_hidden_layers)
