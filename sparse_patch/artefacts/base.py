"""What every artefact says of itself: the header, how it is read, and whether it was made for a model.

A header says what a file is, which model it was made for, with what settings and by what. It stands under the key
`artefact`: of a mapping in JSON and YAML, of the metadata in safetensors (as JSON, the format has strings only). Files
of earlier versions and of others have none; the module of their format makes one of what they say.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load

from sparse_patch.errors import ConfigError, one_line, quoted, reason
from sparse_patch.files.reading import MOST, parse_json, read_bytes
from sparse_patch.model_shape import ModelShape
from sparse_patch.version import __version__

KEY = "artefact"
VERSIONS = {"minference": 1, "sale": 1, "layers": 1, "moa": 1}  # by kind: NAME of `sparse-patch calibrate NAME`

Size = Annotated[int, Field(ge=1, le=MOST)]


class MadeFor(BaseModel):
    """The model that an artefact was made for, as far as the file says.

    Attributes:
        id: what the user named it; of no meaning for whether it fits.
        model_type: see `ModelShape`, as the other sizes. None for what a file without a header does not say.
        num_layers: likewise.
        num_heads: likewise.
        num_kv_heads: likewise.
        hidden_size: likewise.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: str = ""
    model_type: str | None = None
    num_layers: Size | None = None
    num_heads: Size | None = None
    num_kv_heads: Size | None = None
    hidden_size: Size | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        """What is compared, by the names of `ModelShape`."""
        return self.model_dump(exclude={"id"}, exclude_none=True)


_SIZES = tuple(name for name in MadeFor.model_fields if name != "id")


class Header(BaseModel):
    """What an artefact says of itself.

    Attributes:
        kind: what it is, by the NAME of the `sparse-patch calibrate NAME` that makes one.
        version: of the format.
        model: what it was made for.
        settings: what it was made with.
        made_by: the software, and its version.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    kind: str
    version: int
    model: MadeFor
    settings: dict[str, Any] = {}
    made_by: str = ""

    @classmethod
    def of(
        cls, kind: str, shape: ModelShape, settings: Mapping[str, Any] | None = None, model_id: str = ""
    ) -> "Header":
        """The header of a file that is made now, for a model.

        Args:
            kind: one of `VERSIONS`.
            shape: the model's.
            settings: what the file is made with, as JSON has it.
            model_id: what the user named the model.
        """
        model = MadeFor(id=model_id, **{name: getattr(shape, name) for name in _SIZES})
        return cls(
            kind=kind,
            version=VERSIONS[kind],
            model=model,
            settings=dict(settings or {}),
            made_by=f"sparse_patch {__version__}",
        )

    @classmethod
    def of_earlier(cls, kind: str, model: MadeFor, settings: Mapping[str, Any] | None = None, by: Any = "") -> "Header":
        """The header of a file that has none; `by` is the version of sparse_patch that made it, if it says."""
        made_by = f"sparse_patch {one_line(by)}" if by else ""
        return cls(kind=kind, version=0, model=model, settings=dict(settings or {}), made_by=made_by)

    def entry(self) -> dict[str, Any]:
        """The header as an entry of a mapping, for JSON and YAML.

        Raises:
            ValueError: it is of a file of an earlier version, which does not say enough of the model.
        """
        if self.version != VERSIONS[self.kind]:
            raise ValueError("header: is of an earlier version of the format; take Header.of(kind, shape) to write it")
        return {KEY: self.model_dump(exclude_none=True)}

    def metadata(self) -> dict[str, str]:
        """The header as the metadata of a safetensors file."""
        return {KEY: json.dumps(self.entry()[KEY])}


class Artefact(NamedTuple):
    """What a file holds.

    Attributes:
        header: None if it has none.
        body: the rest of it. Of a safetensors file a mapping with `tensors` and `metadata`.
    """

    header: Header | None
    body: Any


def how_to_make(name: str) -> str:
    """The way out of every message about an artefact: the end of a sentence."""
    return f'run "sparse-patch calibrate {name} --model M --out FILE"'


def place_of(path: str | Path | None) -> str:
    """What a message about an artefact begins with."""
    return f"calibration: {one_line(path)}"


def read_artefact(path: str | Path, kind: str, read: Callable[[str | Path], Any]) -> Artefact:
    """What a file holds: its header, and the rest.

    Args:
        path: the file.
        kind: what it should be.
        read: how its container is read: `read_json`, `read_yaml` or `read_safetensors`.

    Raises:
        ConfigError: the file cannot be read, or its header is not valid or says that it is something else.
    """
    try:
        data = read(path)
    except ConfigError as error:
        raise ConfigError(f"calibration: {error}; {how_to_make(kind)}") from None
    if not isinstance(data, dict) or KEY not in data:
        return Artefact(None, data)
    header = _header(data[KEY], kind, f"{place_of(path)}: {KEY}")
    return Artefact(header, {key: value for key, value in data.items() if key != KEY})


def _header(said: Any, kind: str, place: str) -> Header:
    def refused(problem: str) -> ConfigError:
        return ConfigError(f"{place}{problem}; {how_to_make(kind)}")

    if not isinstance(said, dict):
        raise refused(f": expected a mapping of {', '.join(Header.model_fields)}, got {quoted(said)}")
    try:
        header = Header.model_validate(said)
    except ValidationError as error:
        raise refused(f".{problem_of(error, Header.model_fields)}") from None
    if header.kind != kind:
        raise refused(f".kind: expected '{kind}', got {quoted(header.kind)}")
    if header.version != VERSIONS[kind]:
        raise refused(f".version: expected {VERSIONS[kind]}, got {quoted(header.version)}")
    for name in _SIZES:
        if name not in header.model.sizes:
            raise refused(f".model.{name}: missing")
    return header


def read_safetensors(path: str | Path) -> dict[str, Any]:
    """The `tensors` and `metadata` of a safetensors file, and the header if it has one.

    Raises:
        ConfigError: the file cannot be read or is no safetensors file.
    """
    data, place = read_bytes(path), one_line(path)
    try:
        tensors = load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a type that this version of safetensors does not make
        raise ConfigError(f"{place}: is no safetensors file ({reason(error)})") from None
    written = data[8 : 8 + int.from_bytes(data[:8], "little")].decode("utf-8")
    metadata = dict(parse_json(written, f"{place}: header").get("__metadata__") or {})
    found = {"tensors": tensors, "metadata": metadata}
    if KEY in metadata:
        found[KEY] = parse_json(metadata.pop(KEY), f"{place}: metadata {KEY}")
    return found


def check_shape(header: Header, shape: ModelShape, place: str) -> None:
    """Raise ConfigError if an artefact was made for another model, by what its header says of it.

    Args:
        header: of the artefact.
        shape: the model's.
        place: what the message begins with.
    """
    for name, theirs in header.model.sizes.items():
        if theirs != (ours := getattr(shape, name)):
            raise misfit(header.kind, f"{name} {one_line(theirs, 60)}", str(ours), place)


def misfit(kind: str, theirs: str, ours: str, place: str) -> ConfigError:
    """The one message about an artefact of another model: the first thing that differs."""
    return ConfigError(f"{place}: was made for another model: {theirs}, this one has {ours}; {how_to_make(kind)}")


def problem_of(error: ValidationError, known: Iterable[str]) -> str:
    """The first problem of a file by a pydantic model, in one line that begins with the field.

    Args:
        error: what validation raised.
        known: fields that there are.
    """
    first = error.errors(include_url=False)[0]
    path = one_line(".".join(map(str, first["loc"])))
    if first["type"] == "value_error":  # raised by a validator of ours, which names the field first
        return str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown key; known keys: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{path}: missing"
    return f"{path}: expected {first['msg'].removeprefix('Input should be ')}, got {quoted(first['input'])}"
