"""The calibration of SALE as a file: a threshold for each query head, and for which model and settings it was found.

A safetensors file with one tensor, `tau`, float32 `[num_layers, num_query_heads]`, and metadata: strings, as the format
has no others. A threshold of 0 makes its head dense.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from sparse_patch.errors import ConfigError, one_line, reason, short
from sparse_patch.methods.base import MOST
from sparse_patch.model_shape import ModelShape
from sparse_patch.reading import LONGEST_NUMBER, parse_json, read_bytes
from sparse_patch.version import __version__
from sparse_patch.writing import write_file

MAKE_ONE = 'run "sparse-patch calibrate sale --model M --out FILE"'
_OF_MODEL = {"model_type": str, "num_layers": int, "num_heads": int, "num_kv_heads": int, "hidden_size": int}
_OF_SEARCH = {"numerics": str, "local_window": int, "block_size": int, "error": float, "sparse_patch": str}


class Thresholds(NamedTuple):
    """What a calibration holds.

    Attributes:
        tau: float32 `[num_layers, num_query_heads]`, on the CPU.
        model: the sizes of the model that it was made for, by the names of `ModelShape`.
        numerics: of the estimates it was made with.
        local_window: of the reference region it was made with, in tokens.
        block_size: side of the tiles that were computed, in tokens: smaller ones would compute less and err more.
        error: the error that it allows a head: the L1 norm, per query, of the change of the output.
        metadata: everything that the file says of itself, as it stands there.
    """

    tau: torch.Tensor
    model: Mapping[str, Any]
    numerics: str
    local_window: int
    block_size: int
    error: float
    metadata: Mapping[str, str]


def write_thresholds(
    path: str | Path,
    tau: torch.Tensor,
    shape: ModelShape,
    *,
    numerics: str,
    local_window: int,
    block_size: int,
    error: float,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write a calibration, in place of an older one at once.

    Args:
        path: the file.
        tau: float32 `[num_layers, num_query_heads]`.
        shape: the model it was made for.
        numerics: of the estimates.
        local_window: in tokens.
        block_size: of the tiles that are computed.
        error: the error that it allows a head.
        more: what else the file is to say (prompts, lengths, ...).

    Raises:
        ValueError: the thresholds are not of the model's shape, not finite or negative.
    """
    if problem := _problem(tau, (shape.num_layers, shape.num_heads)):
        raise ValueError(f"tau: {problem}")
    settings = {"numerics": numerics, "local_window": local_window, "block_size": block_size, "error": error}
    settings |= {"sparse_patch": __version__}
    sizes = {key: getattr(shape, key) for key in _OF_MODEL}
    metadata = {**(more or {}), **{key: str(value) for key, value in (sizes | settings).items()}}
    write_file(Path(path), save({"tau": tau.cpu().contiguous()}, metadata))


def read_thresholds(path: str | Path) -> Thresholds:
    """What a file that `write_thresholds` wrote holds.

    Raises:
        ConfigError: the file cannot be read or is none of this format; the message names field, file and place.
    """
    place = f"calibration: {one_line(path)}"
    try:
        data = read_bytes(path)
        tensors = load(data)
        header = parse_json(
            data[8 : 8 + int.from_bytes(data[:8], "little")].decode("utf-8"), f"{one_line(path)}: header"
        )
    except ConfigError as error:
        raise ConfigError(f"calibration: {error}; {MAKE_ONE}") from None
    except (SafetensorError, KeyError) as error:  # KeyError: a type that this version of safetensors does not make
        raise ConfigError(f"{place}: is no safetensors file ({reason(error)}); {MAKE_ONE}") from None
    if list(tensors) != ["tau"]:
        raise ConfigError(
            f"{place}: expected one tensor, tau, got {one_line(', '.join(tensors) or 'none')}; {MAKE_ONE}"
        )
    metadata = header.get("__metadata__") or {}
    values = {key: _value(place, metadata, key, kind) for key, kind in (_OF_MODEL | _OF_SEARCH).items()}
    if problem := _problem(tensors["tau"], (values["num_layers"], values["num_heads"])):
        raise ConfigError(f"{place}: tau: {problem}; {MAKE_ONE}")
    model = {key: values[key] for key in _OF_MODEL}
    settings = {key: values[key] for key in _OF_SEARCH if key != "sparse_patch"}
    return Thresholds(tensors["tau"], model, **settings, metadata=metadata)


def check_shape(thresholds: Thresholds, shape: ModelShape, place: str) -> None:
    """Raise ConfigError if a calibration was made for another model; the message begins with `place`."""
    for key, theirs in thresholds.model.items():
        if theirs != getattr(shape, key):
            made, here = one_line(theirs, 60), getattr(shape, key)
            raise ConfigError(f"{place}: was made for another model: {key} {made}, this one has {here}; {MAKE_ONE}")


def _value(place: str, metadata: Mapping[str, str], key: str, kind: type) -> Any:
    """A field of the metadata as what it is."""
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


def _problem(tau: torch.Tensor, shape: tuple[int, int]) -> str | None:
    """What is wrong with thresholds of a model with so many layers and query heads."""
    if tau.dtype != torch.float32 or tuple(tau.shape) != shape:
        kind = str(tau.dtype).removeprefix("torch.")
        return f"expected float32 {list(shape)} (layers, query heads), got {kind} {list(tau.shape)}"
    wrong = ~(tau.isfinite() & (tau >= 0))
    if wrong.any():
        layer, head = wrong.nonzero()[0].tolist()
        return f"layer {layer}, head {head}: expected a number of 0 or more, got {tau[layer, head].item()}"
    return None
