"""The protocol of a method, and the registry that finds every method in this folder.

A method is one file here: a pydantic model whose fields are the fields of its YAML, with one `plan`. The name of the
file, of the YAML in `configs/` and of the `method:` value are the same.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import Self

from sparse_patch.call import AttentionCall, Phase
from sparse_patch.errors import ConfigError
from sparse_patch.files.reading import MOST
from sparse_patch.model_shape import LayerIndex, ModelShape, layer_numbers
from sparse_patch.plans import Dense, Plan

Tokens = Annotated[int, Field(ge=0, le=MOST)]


class Excluded(BaseModel):
    """Every layer but these."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    exclude: list[LayerIndex]


class Method(BaseModel, ABC):
    """A sparse attention method: its settings, and how it decides.

    Attributes:
        files: the fields that name files. A relative path counts from the folder of the YAML that has it.
        forms: what a field may be, for messages, if pydantic does not say it well.
        renamed: earlier names of fields, and what they are called now.
        method: the registered name.
        layers: which layers use it: "all", a list of indices, or `{exclude: [...]}`. The others stay dense.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    phases: ClassVar[tuple[Phase, ...]]
    summary: ClassVar[str]
    paper: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()
    forms: ClassVar[Mapping[str, str]] = {"layers": '"all", a list of layer numbers or {exclude: [numbers]}'}
    renamed: ClassVar[Mapping[str, str]] = {}

    method: str
    layers: Literal["all"] | list[LayerIndex] | Excluded = "all"

    @abstractmethod
    def plan(self, call: AttentionCall) -> Plan:
        """Decide which keys each query of the call reads, without a host sync."""

    def for_model(self, shape: ModelShape) -> Self:
        """The method as it runs on a model, with what depends on the model resolved.

        Raises:
            ValueError: the settings do not fit the model; the message begins with the field.
        """
        return self

    def layers_of(self, num_layers: int) -> set[int]:
        """The layers that use the method, of a model with so many.

        Raises:
            ValueError: a layer that the model does not have; the message begins with the field.
        """
        if self.layers == "all":
            return set(range(num_layers))
        if isinstance(self.layers, Excluded):
            return set(range(num_layers)) - layer_numbers("layers", self.layers.exclude, num_layers)
        return layer_numbers("layers", self.layers, num_layers)

    def role(self, layer: int) -> str:
        """What a layer that uses the method does, in a word or two; empty where all of them do the same."""
        return ""

    def remark(self) -> str:
        """What a report should say about the settings beside its numbers, as one line; empty for nothing."""
        return ""

    def digests(self) -> dict[str, str]:
        """The SHA-256 of each file that the settings name, by field: a file that changed is another setting.

        Raises:
            ConfigError: a file is not there any more.
        """
        paths = {field: getattr(self, field) for field in self.files if getattr(self, field) is not None}
        try:
            return {field: hashlib.sha256(Path(path).read_bytes()).hexdigest() for field, path in paths.items()}
        except OSError as error:
            raise ConfigError(f"{self.method}: {error.filename}: cannot be read: {error.strerror}") from None

    @classmethod
    def registered_name(cls) -> str:
        return str(cls.model_fields["method"].default)


class PrefillMethod(Method):
    """A method for prefill.

    Attributes:
        min_length: rows of fewer tokens are computed densely: below some length selection costs more than it saves.
    """

    phases = ("prefill",)

    min_length: Tokens = 4096

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """The dense answer that every prefill method gives to short prompts."""
        if call.kv_length < self.min_length:
            return Dense(f"shorter than min_length {self.min_length}")
        return None


class DecodeMethod(Method):
    """A method for decode.

    A plan may carry its choice on to the layers after it in `call.forward_state`, which lives for one forward, and keep
    statistics in `call.kv_state`, which lives with the cache.

    Attributes:
        min_length: caches of fewer tokens are read densely. Of a static cache its whole size counts, because how much
            of it is filled is known on the device only.
    """

    phases: ClassVar[tuple[Phase, ...]] = ("decode",)

    min_length: Tokens = 4096

    @property
    def correct_every(self) -> int | None:
        """Tokens after which what was decoded sparsely is computed once more, densely; None for never."""
        return None

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """The dense answer that every decode method gives to short caches."""
        if call.kv_length < self.min_length:
            return Dense(f"shorter than min_length {self.min_length}")
        return None

    def remember(self, call: AttentionCall) -> None:
        """Bring `call.kv_state` up to date with the keys of a call, of prefill or of decode, before it is planned."""

    def select(self, call: AttentionCall, logits: torch.Tensor, lse: torch.Tensor) -> None:
        """Choose for the layers that follow, after a plan with `wants_logits` was executed.

        Args:
            call: the call.
            logits: float32 `[B, Hq, capacity]`, of the last query: scaled, softcapped, by position within the row
                (`kv_start[b]` is 0). What lies at the row's length or behind it has no meaning.
            lse: float32 `[B, Hq]`, natural logarithm, of the same query.
        """
