"""The header of every artefact: how it is read, and the check that an artefact was made for a model.

A header says what a file is, and which model, settings and software it was made with. It is stored under the key
`artefact`: of the mapping in JSON and YAML, of the metadata in safetensors (as JSON, because metadata has only
strings). Files of earlier versions and of other software have no header; the module of their format makes one from
their content.
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
VERSIONS = {"minference": 1, "sale": 1, "layers": 1, "moa": 1}  # by kind, the NAME of `sparse-patch calibrate NAME`

Size = Annotated[int, Field(ge=1, le=MOST)]


class MadeFor(BaseModel):
    """The model that an artefact was made for, as far as the file says.

    Attributes:
        id: the user's name for the model; it is not compared.
        model_type: see `ModelShape`, as for the other sizes. None if a file without a header does not say.
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
        """The sizes that are compared, by their names in `ModelShape`."""
        return self.model_dump(exclude={"id"}, exclude_none=True)


_SIZES = tuple(name for name in MadeFor.model_fields if name != "id")


class Header(BaseModel):
    """The header of an artefact.

    Attributes:
        kind: the kind of artefact: the NAME of the `sparse-patch calibrate NAME` that makes it.
        version: version of the format.
        model: the model that the artefact was made for.
        settings: the settings that it was made with.
        made_by: the software that made it, and its version.
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
        """The header of a new file for a model.

        Args:
            kind: one of `VERSIONS`.
            shape: shape of the model.
            settings: the settings that the file is made with, as JSON values.
            model_id: the user's name for the model.
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
        """The header of a file that has none; `by` is the version of sparse_patch that made it, if the file says so."""
        made_by = f"sparse_patch {one_line(by)}" if by else ""
        return cls(kind=kind, version=0, model=model, settings=dict(settings or {}), made_by=made_by)

    def entry(self) -> dict[str, Any]:
        """The header as an entry of a mapping, for JSON and YAML.

        Raises:
            ValueError: the header is of an earlier version, which does not say enough about the model.
        """
        if self.version != VERSIONS[self.kind]:
            raise ValueError("header: is of an earlier version of the format; use Header.of(kind, shape) to write it")
        return {KEY: self.model_dump(exclude_none=True)}

    def metadata(self) -> dict[str, str]:
        """The header as the metadata of a safetensors file."""
        return {KEY: json.dumps(self.entry()[KEY])}


class Artefact(NamedTuple):
    """The content of a file.

    Attributes:
        header: None if the file has no header.
        body: the rest of the file. For a safetensors file, a mapping with `tensors` and `metadata`.
    """

    header: Header | None
    body: Any


def how_to_make(name: str) -> str:
    """The end of every message about an artefact: how to make a valid one."""
    return f'run "sparse-patch calibrate {name} --model M --out FILE"'


def place_of(path: str | Path | None) -> str:
    """The beginning of a message about an artefact."""
    return f"calibration: {one_line(path)}"


def read_artefact(path: str | Path, kind: str, read: Callable[[str | Path], Any]) -> Artefact:
    """Read a file: its header, and the rest.

    Args:
        path: the file.
        kind: the expected kind.
        read: reads the file's container: `read_json`, `read_yaml` or `read_safetensors`.

    Raises:
        ConfigError: the file cannot be read, or its header is not valid or names another kind.
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
        ConfigError: the file cannot be read or is not a safetensors file.
    """
    data, place = read_bytes(path), one_line(path)
    try:
        tensors = load(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that this version of safetensors does not have
        raise ConfigError(f"{place}: is not a safetensors file ({reason(error)})") from None
    written = data[8 : 8 + int.from_bytes(data[:8], "little")].decode("utf-8")
    metadata = dict(parse_json(written, f"{place}: header").get("__metadata__") or {})
    found = {"tensors": tensors, "metadata": metadata}
    if KEY in metadata:
        found[KEY] = parse_json(metadata.pop(KEY), f"{place}: metadata {KEY}")
    return found


def check_shape(header: Header, shape: ModelShape, place: str) -> None:
    """Raise ConfigError if an artefact was made for another model according to its header.

    Args:
        header: header of the artefact.
        shape: shape of the model.
        place: beginning of the message.
    """
    for name, theirs in header.model.sizes.items():
        if theirs != (ours := getattr(shape, name)):
            raise misfit(header.kind, f"{name} {one_line(theirs, 60)}", str(ours), place)


def misfit(kind: str, theirs: str, ours: str, place: str) -> ConfigError:
    """The error about an artefact of another model; it names the first difference."""
    return ConfigError(f"{place}: was made for another model: {theirs}, this one has {ours}; {how_to_make(kind)}")


def problem_of(error: ValidationError, known: Iterable[str]) -> str:
    """The first problem that a pydantic model found in a file, in one line that begins with the field.

    Args:
        error: the error that validation raised.
        known: names of the fields that exist.
    """
    first = error.errors(include_url=False)[0]
    path = one_line(".".join(map(str, first["loc"])))
    if first["type"] == "value_error":  # raised by one of our validators, which name the field first
        return str(first["ctx"]["error"])
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown key; known keys: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{path}: missing"
    return f"{path}: expected {first['msg'].removeprefix('Input should be ')}, got {quoted(first['input'])}"
