"""Layer roles: a YAML file that says which layers of a model read every key, and which of them select keys.

The file has a header, `full` and `select`; `measured` holds what the search found, for people. Files of earlier
versions have the model's sizes under `model` instead of a header, and their settings under `measured`.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict

from sparse_patch.artefacts.base import Header, MadeFor, how_to_make, place_of, read_artefact
from sparse_patch.errors import ConfigError, FieldError, quoted
from sparse_patch.files.reading import MOST, read_yaml
from sparse_patch.files.writing import write_file
from sparse_patch.model_shape import LayerIndex, ModelShape, layer_numbers

KIND = "layers"
MAKE_ONE = how_to_make(KIND)
_OF_MODEL = {"model_type": str, "num_layers": int, "num_heads": int, "hidden_size": int}


class Roles(BaseModel):
    """Which layers read every key, and which of them select keys; the other layers are sparse.

    Attributes:
        full: layers that read every key; selecting layers may be among them.
        select: layers that select keys. None is DELTA's rule: every full layer that is followed by a sparse layer.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    full: list[LayerIndex] = []
    select: list[LayerIndex] | None = None

    def resolved(self, shape: ModelShape, place: str, others: frozenset[int] = frozenset()) -> "Roles":
        """The roles as layer numbers from 0, with `select` spelled out; other layers that are not sparse are in `full`.

        Args:
            shape: the model.
            place: where the roles are written, for messages, including the separator before a field.
            others: layers that do not use the method; they read every key.

        Raises:
            FieldError: the roles do not fit the model; its field begins with `place`.
        """
        full = layer_numbers(f"{place}full", self.full, shape.num_layers) | shape.local_layers | others
        if self.select is None:
            own = shape.local_layers | others
            select = followed_by_sparse(full, [layer for layer in range(shape.num_layers) if layer not in own])
        else:
            select = layer_numbers(f"{place}select", self.select, shape.num_layers)
        if local := select & shape.local_layers:
            problem = f"layer {min(local)} has no full attention in this model and cannot select"
            raise FieldError(f"{place}select", problem)
        if unused := select & others:
            raise FieldError(f"{place}select", f"layer {min(unused)} is not among `layers`", "add it there")
        sparse = set(range(shape.num_layers)) - full - select
        if len(shape.local_layers) == shape.num_layers:
            problem = "every layer of this model has local attention of its own, none can be sparse"
            raise FieldError(f"{place}full", problem)
        if not sparse:
            raise FieldError(f"{place}full", f"no layer of {shape.num_layers} is left to be sparse")
        if not select or min(sparse) < min(select):
            problem = f"layer {min(sparse)} would be sparse with no selecting layer before it"
            raise FieldError(f"{place}select", problem, "add it to full")
        return Roles(full=sorted(full - select), select=sorted(select))


def followed_by_sparse(full: set[int], layers: Sequence[int]) -> set[int]:
    """DELTA's rule: the layers in `full` whose next layer among `layers` is not in `full`."""
    return {layer for layer, after in pairwise(layers) if layer in full and after not in full}


class Calibration(NamedTuple):
    """The result of `sparse-patch calibrate layers`.

    Attributes:
        header: the model and settings of the search.
        layers: the roles that it chose.
    """

    header: Header
    layers: Roles


def write_calibration(path: str | Path, calibration: Calibration, measured: Mapping[str, Any]) -> None:
    """Write a calibration as YAML, one line per entry. An older file is replaced atomically.

    Args:
        path: the file.
        calibration: the part that methods read.
        measured: what else the search found, for people. Every item of a list has its own line.
    """
    data = {**calibration.header.entry(), **calibration.layers.model_dump(), "measured": dict(measured)}
    text = "# Which layers of a model select keys for decode, by `sparse-patch calibrate layers`.\n"
    write_file(Path(path), text + "\n".join(_lines(data)) + "\n")


def _lines(data: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, dict) and value and not indent:
            yield f"{key}:"
            yield from _lines(value, "  ")
        elif isinstance(value, list) and any(isinstance(row, dict) for row in value):
            yield f"{indent}{key}:"
            yield from (f"{indent}- {_flow(row)}" for row in value)
        else:
            yield f"{indent}{key}: {_flow(value)}"


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000).split("\n...")[0].strip()


def read_calibration(path: str | Path) -> Calibration:
    """Read a file of `sparse-patch calibrate layers`. The file may hold more than that.

    Raises:
        ConfigError: the file cannot be read or is not of this format; the message names field, file and place.
    """
    place = place_of(path)
    header, data = read_artefact(path, KIND, read_yaml)
    if not isinstance(data, dict):
        raise ConfigError(f"{place}: expected a mapping with artefact, full and select; {MAKE_ONE}")
    for key in ("full", "select") if header else ("model", "full", "select"):
        if key not in data:
            raise ConfigError(f"{place}: {key}: missing; {MAKE_ONE}")
    header = header or _earlier_header(data, place)
    for key in ("full", "select"):
        layers = data[key]
        if not isinstance(layers, list) or not all(type(layer) is int and abs(layer) <= MOST for layer in layers):
            raise ConfigError(f"{place}: {key}: expected a list of layer numbers, got {quoted(layers)}")
    return Calibration(header, Roles(full=data["full"], select=data["select"]))


def _earlier_header(data: Mapping[Any, Any], place: str) -> Header:
    """The header of a file of an earlier version, from its `model`."""
    model = data["model"]
    if not isinstance(model, dict):
        raise ConfigError(f"{place}: model: expected a mapping of {', '.join(_OF_MODEL)}, got {quoted(model)}")
    for key, kind in _OF_MODEL.items():
        if type(value := model.get(key)) is not kind:
            expected = "a name" if kind is str else "a number"
            raise ConfigError(f"{place}: model.{key}: expected {expected}, got {quoted(value)}")
        if isinstance(value, int) and not 0 < value <= MOST:
            raise ConfigError(f"{place}: model.{key}: expected 1 to {MOST}, got {quoted(value)}")
    measured = data.get("measured")
    known = measured if isinstance(measured, dict) else {}
    settings = {key: known[key] for key in ("model", "length", "seed", "budget", "samples") if key in known}
    name = settings.pop("model", "")
    sizes = {key: model[key] for key in _OF_MODEL}
    return Header.of_earlier(KIND, MadeFor(id=name if isinstance(name, str) else "", **sizes), settings)
