"""The calibration file of SALE: a threshold for each query head, and the model and settings of the search.

It is a safetensors file with one tensor, `tau`, float32 `[num_layers, num_query_heads]`, and a header in its metadata.
A threshold of 0 makes its head dense. Files of earlier versions have one metadata field for each size and setting.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save

from sparse_patch.artefacts.base import (
    Header,
    MadeFor,
    how_to_make,
    place_of,
    problem_of,
    read_artefact,
    read_safetensors,
)
from sparse_patch.errors import ConfigError, FieldError, one_line, short
from sparse_patch.files.reading import LONGEST_NUMBER, MOST
from sparse_patch.files.writing import write_file

KIND = "sale"
MAKE_ONE = how_to_make(KIND)
_OF_MODEL = {"model_type": str, "num_layers": int, "num_heads": int, "num_kv_heads": int, "hidden_size": int}
_OF_SEARCH = {"numerics": str, "local_window": int, "block_size": int, "error": float, "sparse_patch": str}

Count = Annotated[int, Field(ge=0, le=MOST)]


class SearchSettings(BaseModel):
    """The settings that thresholds were found with. A configuration must not differ from them.

    Attributes:
        numerics: numerics of the estimates.
        window: window of the reference region, in tokens.
        block_size: side of the computed tiles, in tokens; smaller tiles would compute less and err more.
        error: the error that a head may have: the L1 norm, per query, of the change of the output.
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    numerics: str
    window: Count
    block_size: Count
    error: Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]


class Thresholds(NamedTuple):
    """The content of a calibration file.

    Attributes:
        tau: float32 `[num_layers, num_query_heads]`, on the CPU.
        header: the model and settings of the search.
        numerics: see `SearchSettings`.
        window: likewise.
        block_size: likewise.
        error: likewise.
    """

    tau: torch.Tensor
    header: Header
    numerics: str
    window: int
    block_size: int
    error: float


def write_thresholds(path: str | Path, tau: torch.Tensor, header: Header) -> None:
    """Write a calibration. An older file is replaced atomically.

    Args:
        path: the file.
        tau: float32 `[num_layers, num_query_heads]`.
        header: the model and settings of the search; the settings have at least those of `SearchSettings`.

    Raises:
        FieldError: the thresholds are not of the model's shape, not finite or negative, or a setting is missing.
    """
    SearchSettings.model_validate(header.settings)
    if problem := _problem(tau, header.model):
        raise FieldError("tau", problem)
    write_file(Path(path), save({"tau": tau.cpu().contiguous()}, header.metadata()))


def read_thresholds(path: str | Path) -> Thresholds:
    """Read a file that `write_thresholds` wrote.

    Raises:
        ConfigError: the file cannot be read or is not of this format; the message names field, file and place.
    """
    place = place_of(path)
    said, body = read_artefact(path, KIND, read_safetensors)
    tensors = body["tensors"]
    if list(tensors) != ["tau"]:
        raise ConfigError(
            f"{place}: expected one tensor, tau, got {one_line(', '.join(tensors) or 'none')}; {MAKE_ONE}"
        )
    header = said or _earlier_header(body["metadata"], place)
    try:
        search = SearchSettings.model_validate(header.settings)
    except ValidationError as error:
        said_wrong = problem_of(error, SearchSettings.model_fields)
        raise ConfigError(f"{place}: artefact.settings.{said_wrong}; {MAKE_ONE}") from None
    if problem := _problem(tensors["tau"], header.model):
        raise ConfigError(f"{place}: tau: {problem}; {MAKE_ONE}")
    return Thresholds(tensors["tau"], header, **search.model_dump())


def _earlier_header(metadata: Mapping[str, str], place: str) -> Header:
    """The header of a file of an earlier version."""
    sizes = {key: _value(place, metadata, key, kind) for key, kind in _OF_MODEL.items()}
    search = {key: _value(place, metadata, key, kind) for key, kind in _OF_SEARCH.items()}
    settings: dict[str, Any] = {key: value for key, value in metadata.items() if key not in sizes} | search
    settings["window"] = settings.pop("local_window")
    try:
        model = MadeFor(id=settings.pop("model", ""), **sizes)
    except ValidationError as error:
        raise ConfigError(f"{place}: metadata {problem_of(error, sizes)}; {MAKE_ONE}") from None
    return Header.of_earlier(KIND, model, settings, by=settings.pop("sparse_patch"))


def _value(place: str, metadata: Mapping[str, str], key: str, kind: type) -> Any:
    """A metadata field, converted to its type."""
    if key not in metadata:
        raise ConfigError(f"{place}: metadata {key}: missing; {MAKE_ONE}")
    text = metadata[key]
    try:
        value = kind(text if kind is str or len(text) < LONGEST_NUMBER else "")
    except ValueError:
        value = math.nan
    if kind is not str and not value >= 0:
        expected = "a whole number" if kind is int else "a number"
        raise ConfigError(f"{place}: metadata {key}: expected {expected}, got {short(text)}; {MAKE_ONE}")
    if kind is not str and value > MOST:
        raise ConfigError(f"{place}: metadata {key}: expected at most {MOST}, got {short(text)}; {MAKE_ONE}")
    return value


def _problem(tau: torch.Tensor, model: MadeFor) -> str | None:
    """What is wrong with the thresholds of a model, if anything."""
    shape = model.num_layers, model.num_heads
    if tau.dtype != torch.float32 or tuple(tau.shape) != shape:
        kind = str(tau.dtype).removeprefix("torch.")
        return f"expected float32 {list(shape)} (layers, query heads), got {kind} {list(tau.shape)}"
    wrong = ~(tau.isfinite() & (tau >= 0))
    if wrong.any():
        layer, head = wrong.nonzero()[0].tolist()
        return f"layer {layer}, head {head}: expected a number of 0 or more, got {tau[layer, head].item()}"
    return None
