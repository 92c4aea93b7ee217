"""Configurations: strict, from YAML files, packaged names, dicts or lists of them.

    load_config("flexprefill.yaml", prefill={"gamma": 0.9})
    load_config(prefill=FlexPrefill(gamma=0.9), decode=Delta())

In place of `prefill` and `decode` a source may have `both`: one method with the same settings for the two.

Every problem is a `ConfigError` of one line that names the source, the path of the field, what was expected and, for an
unknown key, the nearest known one.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, SerializeAsAny, ValidationError, model_validator
from typing_extensions import Self

from sparse_patch.call import PHASES, Phase
from sparse_patch.errors import ConfigError, FieldError, described, nearest, one_line, reason, short
from sparse_patch.files.reading import read_yaml
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.methods.base.problems import problem_of
from sparse_patch.methods.base.registry import find_method, names_for
from sparse_patch.methods.base.settings import Method
from sparse_patch.model_shape import ModelShape

ConfigSource = str | PathLike[str] | Mapping[str, Any] | Method
T = TypeVar("T")
Backend = Literal["auto", "triton", "flash", "torch", "reference"]
BOTH = "both"  # the key that stands for every phase


class PatchConfig(BaseModel):
    """What `patch_model` does to a model.

    Attributes:
        prefill: method for calls that process a prompt or a chunk of one; None leaves them dense.
        decode: method for calls that generate tokens; None leaves them dense.
        backend: which implementation executes plans: "auto" takes the fastest that serves the device.
        dense: what runs calls that are dense by the configuration or by the method's choice (short prompts, layers that
            are not selected, `method: dense`): "unpatched", the implementation that the model had, or "best", the
            fastest dense kernel present where it serves the call: in prefill flash-attn-4 or cuDNN on Hopper, in decode
            our own kernel on any GPU that runs Triton, and on a CPU PyTorch's with the heads of a group at once. It
            rounds differently.
        decode_graph: whether `generate` on a GPU captures the decode step of the model in a CUDA graph ("auto") or
            not ("off"). What a graph cannot serve runs eagerly, and the report says why. With a graph, and with the
            cache that `generate` makes, dense decode runs on our own kernel whatever `dense` says. So do corrections of
            the cache, on any GPU that runs Triton.
        on_unsupported: what a call that the method cannot serve does: "warn" (once per reason) and go dense, "error",
            or "silent" (dense). The report always counts it.
        source: where the configuration came from, for messages and the report.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prefill: SerializeAsAny[Method] | None = None
    decode: SerializeAsAny[Method] | None = None
    backend: Backend = "auto"
    dense: Literal["unpatched", "best"] = "unpatched"
    decode_graph: Literal["auto", "off"] = "auto"
    on_unsupported: Literal["warn", "error", "silent"] = "warn"
    source: str = "dict"

    @model_validator(mode="after")
    def _phases_name_the_same_files(self) -> Self:
        if self.prefill is None or self.decode is None or self.prefill.method != self.decode.method:
            return self
        for field in self.decode.files:
            theirs, ours = getattr(self.prefill, field), getattr(self.decode, field)
            if theirs != ours:
                raise FieldError(
                    f"decode.{field}",
                    f"{one_line(ours)} is not that of prefill, {one_line(theirs)}",
                    f"name one, under `{BOTH}` for instance",
                )
        return self

    def method(self, phase: Phase) -> Method | None:
        return self.prefill if phase == "prefill" else self.decode

    def settings(self) -> dict[str, Any]:
        """The resolved configuration as plain data, every default spelled out."""
        return self.model_dump(exclude={"source"}, exclude_none=True)

    def fingerprint(self) -> str:
        """Twelve hex digits that change whenever a setting, or what is in a file that one names, does."""
        settings = self.settings()
        for phase in PHASES:
            if method := self.method(phase):
                settings[phase] |= method.digests()  # in place of the paths: the file may move
        return hashlib.sha256(yaml.safe_dump(settings).encode()).hexdigest()[:12]

    def check_files(self) -> None:
        """Read the files that the methods name, as far as they can be read without a model.

        Raises:
            ConfigError: a file cannot be read, is not valid, or was made with other settings.
        """
        for phase in PHASES:
            if method := self.method(phase):
                self._explained(phase, method.artefact)

    def bind(self, shape: ModelShape) -> "BoundConfig":
        """The configuration on a model, see `Method.bind`.

        Raises:
            ConfigError: a method does not fit the model.
        """
        bound: dict[Phase, BoundMethod] = {}
        for phase in PHASES:
            if method := self.method(phase):
                bound[phase] = self._explained(phase, partial(method.bind, shape))
        settings = self.model_copy(update={phase: method.settings for phase, method in bound.items()})
        return BoundConfig(settings, bound.get("prefill"), bound.get("decode"))

    def layers(self, phase: Phase, num_layers: int) -> set[int]:
        """The layers that use a method in this phase; raises ConfigError for an index the model does not have."""
        method = self.method(phase)
        return set() if method is None else self._explained(phase, partial(method.layers_of, num_layers))

    def _explained(self, phase: Phase, ask: Callable[[], T]) -> T:
        """What a method answers; if it raises, the message says which configuration and phase it is about."""
        try:
            return ask()
        except ConfigError as error:
            raise ConfigError(f"{self.source}: {phase}.{error}") from None


@dataclass(frozen=True)
class BoundConfig:
    """A configuration on a model.

    Attributes:
        settings: the configuration, with what its methods leave open taken from the model.
        prefill: the method that plans prefill, or None.
        decode: the method that plans decode, or None.
    """

    settings: PatchConfig
    prefill: BoundMethod | None
    decode: BoundMethod | None

    def method(self, phase: Phase) -> BoundMethod | None:
        """The method that plans a phase."""
        return self.prefill if phase == "prefill" else self.decode


_KEYS = ("prefill", "decode", BOTH, *(key for key in PatchConfig.model_fields if key not in (*PHASES, "source")))


def packaged_configs() -> dict[str, Path]:
    """The configurations that ship with the package, by file name."""
    inside = Path(str(files("sparse_patch"))) / "configs"  # an installed wheel
    folder = inside if inside.is_dir() else inside.parent.parent / "configs"  # a checkout
    return {path.name: path for path in sorted(folder.glob("*.yaml"))}


def load_config(source: ConfigSource | Sequence[ConfigSource] | None = None, /, **overrides: Any) -> PatchConfig:
    """Read, merge and check a configuration.

    Args:
        source: a path, the name of a packaged configuration ("flexprefill.yaml" or "flexprefill"; a file of that name
            in the working directory comes first), a dict, a method such as `FlexPrefill(gamma=0.9)` for all its phases,
            or a list of these that do not both set a phase. None if the overrides say everything.
        **overrides: fields to change, merged into the source: `prefill={"gamma": 0.9}`, or `both={...}` for each phase.
            An override that is a method, or that names another `method`, replaces the phase instead.

    Raises:
        ConfigError: see the module's text.
    """
    sources = list(source) if isinstance(source, Sequence) and not isinstance(source, str) else [source]
    if not sources:
        raise ConfigError("config: the list is empty; give at least one file, name, dict or method")
    if source is None and not overrides:
        raise ConfigError("config: missing; give a file, a name, a dict, a method or prefill= and decode=")
    parts = [_read(part) for part in sources if part is not None]
    name = one_line("+".join(part_name for part_name, _ in parts)) or "arguments"
    merged: dict[str, Any] = {}
    for part_name, data in parts:
        _merge_part(merged, part_name, data)
    for key, value in _for_each_phase("overrides", overrides).items():
        merged[key] = _override(merged.get(key), value)
    config = _validate(name, merged)
    config.check_files()
    return config


def _read(source: ConfigSource) -> tuple[str, dict[str, Any]]:
    if isinstance(source, Mapping):
        return "dict", _for_each_phase("dict", source)
    if isinstance(source, Method):
        return source.method, dict.fromkeys(source.phases, source)
    if not isinstance(source, str | PathLike):
        raise ConfigError(f"config: expected a path, a packaged name, a dict or a method, got {described(source)}")
    path = _find(source)
    data = read_yaml(path)
    if not isinstance(data, dict):
        kind = "an empty file" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{one_line(path)}: expected a mapping with the keys {_known_keys()}, got {kind}")
    name = path.name if path in packaged_configs().values() else one_line(source)
    of_phases = _for_each_phase(name, data).items()
    return name, {key: _beside(path.parent, value) if key in PHASES else value for key, value in of_phases}


def _for_each_phase(name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """A source with what is under `both` written out for every phase."""
    if BOTH not in data:
        return dict(data)
    if twice := [phase for phase in PHASES if phase in data]:
        raise ConfigError(f"{name}: {twice[0]}: {BOTH} sets it too; keep one of them")
    return {**dict.fromkeys(PHASES, data[BOTH]), **{key: value for key, value in data.items() if key != BOTH}}


def _beside(folder: Path, data: Any) -> Any:
    """The settings of a phase, files that they name looked for in the folder of their YAML."""
    name = data.get("method") if isinstance(data, dict) else None
    method = find_method(name) if isinstance(name, str) else None
    if method is None:
        return data
    return {
        key: str(folder / value) if key in method.files and isinstance(value, str) else value
        for key, value in data.items()
    }


def _find(source: str | PathLike[str]) -> Path:
    try:
        path = Path(source)
        if path.exists() and not path.is_dir():
            return path
    except (OSError, TypeError, ValueError) as error:  # too long, bytes, a NUL
        raise ConfigError(f"{one_line(source)}: cannot be read: {reason(error)}") from None
    packaged = packaged_configs()
    if path.parent == Path("."):
        for name in (path.name, f"{path.name}.yaml"):
            if name in packaged:
                return packaged[name]
    hint = nearest(path.stem, [name.removesuffix(".yaml") for name in packaged])
    raise ConfigError(f"{one_line(path)}: no such file{hint}; packaged configs: {', '.join(packaged)}")


def _merge_part(merged: dict[str, Any], name: str, data: dict[str, Any]) -> None:
    for key, value in data.items():
        if key in merged:
            raise ConfigError(
                f"{name}: {one_line(key)}: an earlier config of the list sets it too; keep it in one of them"
            )
        merged[key] = value


def _override(old: Any, new: Any) -> Any:
    if isinstance(old, Method) and isinstance(new, Mapping):
        old = old.model_dump()
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    named = new.get("method", old.get("method"))
    if not isinstance(named, str) or named != old.get("method"):
        return dict(new)
    return {**old, **new}


def _check_keys(problem: str, data: Mapping[Any, Any]) -> None:
    if wrong := [key for key in data if not isinstance(key, str)]:
        raise ConfigError(f"{problem}; got {described(wrong[0])}")


def _validate(name: str, data: dict[str, Any]) -> PatchConfig:
    _check_keys(f"{name}: expected keys that are strings, {_known_keys()}", data)
    if "source" in data:
        raise ConfigError(f"{name}: source: unknown key; known keys: {_known_keys()}")
    if all(data.get(phase) is None for phase in PHASES) and not data.keys() - PatchConfig.model_fields.keys():
        raise ConfigError(f"{name}: sets neither prefill nor decode; give at least one of them a `method`")
    resolved = dict(data)
    for phase in PHASES:
        if data.get(phase) is not None:
            resolved[phase] = _validate_method(name, phase, data[phase])
    try:
        return PatchConfig(**resolved, source=name)
    except ValidationError as error:
        raise ConfigError(f"{name}: {problem_of(error, PatchConfig.model_fields, known=_KEYS)}") from None


def _validate_method(name: str, phase: Phase, data: Any) -> Method:
    names = names_for(phase)
    known = f"expected one of {', '.join(names)}"
    if isinstance(data, Method):
        if phase not in data.phases:
            raise ConfigError(f"{name}: {phase}.method: {known}, got {short(data.method)}")
        return data
    if not isinstance(data, Mapping):
        raise ConfigError(f"{name}: {phase}: expected a method or a mapping with a `method`, got {short(data)}")
    _check_keys(f"{name}: {phase}: expected keys that are strings", data)
    if "method" not in data:
        raise ConfigError(f"{name}: {phase}.method: missing; {known}")
    got = data["method"]
    method = find_method(got) if isinstance(got, str) else None
    if method is None or phase not in method.phases:
        raise ConfigError(f"{name}: {phase}.method: {known}, got {short(got)}{nearest(got, names)}")
    try:
        return method(**data)
    except FieldError as error:
        raise ConfigError(f"{name}: {error.at(phase)}") from None


def _known_keys() -> str:
    return ", ".join(_KEYS)
