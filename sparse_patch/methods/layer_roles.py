"""What TidalDecode, LessIsMore and DELTA have in common: a few layers choose what the others read.

A full layer reads everything. A selecting layer reads everything as well, and chooses a list of keys by its own
attention. Any other layer is sparse: it reads the list of the nearest selecting layer before it, in the same forward.
Layers without full attention (sliding windows and the like) stay as the model has them.

Which layer does what depends on the model. It comes from `layers` if that is set, else from the file of `calibration`,
else from a published choice for the model's shape.
"""

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from typing_extensions import Self

from sparse_patch.call import AttentionCall
from sparse_patch.errors import ConfigError, one_line, quoted
from sparse_patch.methods.base import MOST, LayerIndex, layer_numbers
from sparse_patch.methods.budget import BudgetedMethod
from sparse_patch.model_shape import ModelShape
from sparse_patch.plans import Dense, PagePlan, Plan
from sparse_patch.reading import read_yaml

_MAKE_ONE = 'run "sparse-patch calibrate layers --model M --out layers.yaml"'
_COMPARED = {"model_type": str, "num_layers": int, "num_heads": int, "hidden_size": int}


class Roles(BaseModel):
    """Which layers read everything, and which of them choose; the others are sparse.

    Attributes:
        full: layers that read everything; selecting ones may be among them.
        select: layers that choose. None for DELTA's rule: every full layer that a sparse one follows.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    full: list[LayerIndex] = []
    select: list[LayerIndex] | None = None

    def resolved(self, shape: ModelShape, place: str) -> "Roles":
        """The roles in numbers from 0, `select` spelled out and what is not sparse nor selecting in `full`.

        Args:
            shape: the model.
            place: where the roles are written, for messages, with what stands between it and a field.

        Raises:
            ValueError: the roles do not fit the model; the message begins with `place` and the field.
        """
        full = layer_numbers(f"{place}full", self.full, shape.num_layers) | shape.local_layers
        if self.select is None:
            select = followed_by_sparse(full, shape)
        else:
            select = layer_numbers(f"{place}select", self.select, shape.num_layers)
        if local := select & shape.local_layers:
            raise ValueError(f"{place}select: layer {min(local)} has no full attention in this model and cannot select")
        sparse = set(range(shape.num_layers)) - full - select
        if len(shape.local_layers) == shape.num_layers:
            raise ValueError(
                f"{place}full: every layer of this model has local attention of its own, none can be sparse"
            )
        if not sparse:
            raise ValueError(f"{place}full: no layer of {shape.num_layers} is left to be sparse")
        if not select or min(sparse) < min(select):
            raise ValueError(
                f"{place}select: layer {min(sparse)} would be sparse with no selecting layer before it; add it to full"
            )
        return Roles(full=sorted(full - select), select=sorted(select))


def followed_by_sparse(full: set[int], shape: ModelShape) -> set[int]:
    """DELTA's rule: the layers of `full` whose next layer is not in it, those without full attention left out."""
    ordered = [layer for layer in range(shape.num_layers) if layer not in shape.local_layers]
    return {layer for layer, after in pairwise(ordered) if layer in full and after not in full}


class Preset(NamedTuple):
    """A published choice of layers.

    Attributes:
        model: its name.
        shape: any model of this shape gets the choice.
        layers: the choice.
        source: who published it.
    """

    model: str
    shape: ModelShape
    layers: Roles
    source: str


class Calibration(NamedTuple):
    """What `sparse-patch calibrate layers` found.

    Attributes:
        model: the sizes of the model it was found for, by the names of `ModelShape`.
        layers: the choice.
    """

    model: Mapping[str, Any]
    layers: Roles


class LayeredMethod(BudgetedMethod):
    """A method of full, selecting and sparse layers.

    Attributes:
        presets: published choices of layers.
        layers: which layers do what; see `Roles`. None to take it from `calibration` or from a preset.
        calibration: YAML file that `sparse-patch calibrate layers` wrote, used where `layers` is None. A relative path
            counts from the folder of the YAML file that names it.
    """

    files = ("calibration",)
    layers_form = "{full: [numbers], select: [numbers]} or null"
    presets: ClassVar[tuple[Preset, ...]] = ()

    layers: Roles | None = None  # type: ignore[assignment]
    calibration: str | None = None

    @model_validator(mode="after")
    def _calibration_is_readable(self) -> Self:
        _ = self.calibrated
        return self

    @cached_property
    def calibrated(self) -> Calibration | None:
        """What the file of `calibration` holds; None without one."""
        return None if self.calibration is None else read_calibration(self.calibration)

    def for_model(self, shape: ModelShape) -> Self:
        """The method with `layers` set to the roles of the model's layers; see `Method.for_model`."""
        if self.layers is not None:
            roles, place = self.layers, "layers."
        elif self.calibrated is not None:
            place = f"calibration: {one_line(self.calibration)}"
            _check_shape(self.calibrated, shape, place)
            roles, place = self.calibrated.layers, f"{place}: "
        else:
            roles, place = self._published(shape), "layers."
        return self.model_copy(update={"layers": roles.resolved(shape, place)})

    def _published(self, shape: ModelShape) -> Roles:
        for preset in self.presets:
            if preset.shape == shape:
                return preset.layers
        raise ValueError(
            f"layers: no published choice for this model ({shape.model_type}, {shape.num_layers} layers); {_MAKE_ONE} "
            f"and set decode.calibration: layers.yaml"
        )

    def layers_of(self, num_layers: int) -> set[int]:
        """Every layer has a role; see `Method.layers_of`."""
        return set(range(num_layers))

    def role(self, layer: int) -> str:
        """ "full", "select" or "sparse"; of a method that `for_model` returned."""
        assert self.layers is not None and self.layers.select is not None, "for_model was not called"
        if layer in self.layers.select:
            return "select"
        return "full" if layer in self.layers.full else "sparse"

    @property
    def list_page_size(self) -> int:
        """Tokens of a page of the lists."""
        return 1

    def plan(self, call: AttentionCall) -> Plan:
        """Everything, with or without the logits, or the list that is at hand; see `Method.plan`."""
        if dense := self.why_dense(call):
            return dense
        role = self.role(call.layer)
        if role == "full":
            return Dense("full layer")
        if role == "select":
            return PagePlan.every(call, self.list_page_size, wants_logits=True)
        plan: PagePlan | None = call.carried.get(self.method)
        if plan is None or plan.pages is None or plan.counts is None:
            return Dense("no list: the selecting layer was dense")
        if plan.pages.shape[1] not in (1, call.k.shape[1], call.q.shape[1]):
            return Dense("the selecting layer has another number of heads")
        if plan.pages.device == call.q.device and plan.heads == call.q.shape[1]:
            return plan
        device = call.q.device  # layers may lie on several devices
        plan = PagePlan.of(call, plan.pages.to(device), plan.counts.to(device), self.list_page_size)
        call.carried[self.method] = plan
        return plan

    def select(self, call: AttentionCall, logits: torch.Tensor, lse: torch.Tensor) -> None:
        """Choose the list of the layers that follow; see `DecodeMethod.select`."""
        call.carried[self.method] = PagePlan.of(call, *self.choose(call, logits, lse), self.list_page_size)

    @abstractmethod
    def choose(self, call: AttentionCall, logits: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The lists that a selecting layer makes: pages, int32 `[B, L, K]`, and counts, int32 `[B, L]`.

        Arguments as those of `DecodeMethod.select`.
        """


def read_calibration(path: str | Path) -> Calibration:
    """What a file of `sparse-patch calibrate layers` holds: `model`, `full` and `select`; it may hold more.

    Raises:
        ConfigError: the file cannot be read or is none of this format; the message names field, file and place.
    """
    place = f"calibration: {one_line(path)}"
    try:
        data = read_yaml(path)
    except ConfigError as error:
        raise ConfigError(f"calibration: {error}; {_MAKE_ONE}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{place}: expected a mapping with model, full and select; {_MAKE_ONE}")
    for key in ("model", "full", "select"):
        if key not in data:
            raise ConfigError(f"{place}: {key}: missing; {_MAKE_ONE}")
    model = data["model"]
    if not isinstance(model, dict):
        raise ConfigError(f"{place}: model: expected a mapping of {', '.join(_COMPARED)}, got {quoted(model)}")
    for key, kind in _COMPARED.items():
        if type(value := model.get(key)) is not kind:
            expected = "a name" if kind is str else "a number"
            raise ConfigError(f"{place}: model.{key}: expected {expected}, got {quoted(value)}")
        if isinstance(value, int) and not 0 < value <= MOST:
            raise ConfigError(f"{place}: model.{key}: expected 1 to {MOST}, got {quoted(value)}")
    for key in ("full", "select"):
        layers = data[key]
        if not isinstance(layers, list) or not all(type(layer) is int and abs(layer) <= MOST for layer in layers):
            raise ConfigError(f"{place}: {key}: expected a list of layer numbers, got {quoted(layers)}")
    return Calibration({key: model[key] for key in _COMPARED}, Roles(full=data["full"], select=data["select"]))


def _check_shape(calibration: Calibration, shape: ModelShape, place: str) -> None:
    """Raise ValueError if a calibration was made for another model."""
    here = {key: getattr(shape, key) for key in _COMPARED}
    if dict(calibration.model) != here:
        theirs, ours = (
            ", ".join(f"{key} {one_line(value, 60)}" for key, value in of.items()) for of in (calibration.model, here)
        )
        raise ValueError(f"{place}: was made for another model ({theirs}), this one has {ours}; {_MAKE_ONE}")


_LLAMA_2_7B = ModelShape("llama", num_layers=32, num_heads=32, num_kv_heads=32, hidden_size=4096)
_LLAMA_3_8B = ModelShape("llama", num_layers=32, num_heads=32, num_kv_heads=8, hidden_size=4096)
_QWEN_3_8B = ModelShape("qwen3", num_layers=36, num_heads=32, num_kv_heads=8, hidden_size=4096)
_QWEN_3_4B = ModelShape("qwen3", num_layers=36, num_heads=32, num_kv_heads=8, hidden_size=2560)


def _select_twice(again: int) -> Roles:
    """TidalDecode's structure: two full layers, a selecting one, sparse ones, and one that selects again."""
    return Roles(full=[0, 1], select=[2, again])


# LessIsMore has TidalDecode's structure, by the same authors; layers from 0.
TIDAL_PRESETS = (
    Preset("Llama-2-7B", _LLAMA_2_7B, _select_twice(7), "TidalDecode, authors' blog"),
    Preset("Llama-3-8B, Llama-3.1-8B", _LLAMA_3_8B, _select_twice(13), "TidalDecode, public code's scripts"),
    Preset("Qwen3-8B", _QWEN_3_8B, _select_twice(12), "LessIsMore, paper"),
    Preset("Qwen3-4B", _QWEN_3_4B, _select_twice(20), "LessIsMore, paper"),
)
