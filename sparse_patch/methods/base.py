"""The protocol of a method, and the registry that finds every method in this folder.

A method is one file here: a pydantic model whose fields are the fields of its YAML, with one `plan`. The name of the
file, of the YAML in `configs/` and of the `method:` value are the same.
"""

import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from functools import cache
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from sparse_patch.call import AttentionCall, Phase
from sparse_patch.plans import Dense, Plan

Tokens = Annotated[int, Field(ge=0)]
LayerIndex = Annotated[int, Field(description="layer from 0; negative counts from the last")]


class Excluded(BaseModel):
    """Every layer but these."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    exclude: list[LayerIndex]


class Method(BaseModel, ABC):
    """A sparse attention method: its settings, and how it decides.

    Attributes:
        method: the registered name.
        layers: which layers use it: "all", a list of indices, or `{exclude: [...]}`. The others stay dense.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    phases: ClassVar[tuple[Phase, ...]]
    summary: ClassVar[str]
    paper: ClassVar[str]

    method: str
    layers: Literal["all"] | list[LayerIndex] | Excluded = "all"

    @abstractmethod
    def plan(self, call: AttentionCall) -> Plan:
        """Decide which keys each query of the call reads, without a host sync."""

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


@cache
def registry() -> dict[str, type[Method]]:
    """Every method by name: the subclasses of `Method` that the modules of this folder define."""
    import sparse_patch.methods as folder

    methods: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{folder.__name__}.{info.name}")
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, Method) and not inspect.isabstract(item):
                methods[item.registered_name()] = item
    return dict(sorted(methods.items()))
