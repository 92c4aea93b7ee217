"""Head schedules as a file: how far each KV head looks back, as a function of the length.

The rule is MoA's (Fu et al. 2024, arXiv 2406.14909): a head keeps `alpha + beta * length` tokens, including its sink.
For a length M these are

    c = trunc(alpha + beta * M), at most M;    C = block * ceil(max(c, min_span) / block)

tokens: the first `sink` tokens and a window of the last `C - sink`, including the query itself. Query i reads key j iff

    j <= i  and  (j < sink  or  i - j < C - sink)

in prefill and in decode alike. With `length_policy: current`, M is i + 1 (the query's own prefix) and C is c. (In the
public code, prefill counts whole blocks and decode counts tokens, so the two differ.) A rule belongs to a KV head, and
all query heads of its group read the same keys. The public code supports only plain multi-head attention; it expands
the cache of other models, which then takes more memory than dense attention.

A retrieval head of DuoAttention (Xiao et al. 2024, arXiv 2410.10819) is the rule (0, 1), a streaming head is the rule
(sink + recent, 0). `schedules_of_moa` and `schedules_of_duo` read the files that the two projects publish.

The file is JSON: a header beside the fields of `HeadSchedules`. Files of earlier versions have `format:
per-head-span/1`, the model's sizes and `provenance` instead of the header.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from sparse_patch.artefacts.base import (
    Header,
    MadeFor,
    Size,
    check_shape,
    how_to_make,
    place_of,
    problem_of,
    read_artefact,
)
from sparse_patch.errors import ConfigError, FieldError, one_line, quoted, short
from sparse_patch.files.reading import MOST, read_json, read_text
from sparse_patch.files.writing import write_file
from sparse_patch.model_shape import ModelShape
from sparse_patch.plans import GrowingWindow

KIND = "moa"
MAKE_ONE = how_to_make(KIND)
PUBLISHED_LENGTHS = (2048, 16384)  # shortest and longest that MoA's published schedules were searched for

Tokens = Annotated[float, Field(ge=-MOST, le=MOST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class HeadSchedules(BaseModel):
    """The content of a file of head schedules.

    Attributes:
        header: the model and settings of the schedules. A file has no entry of this name.
        granularity: what has a rule.
        sink: first tokens that every head keeps.
        block: spans are multiples of this number of tokens.
        min_span: minimum number of tokens that a head keeps, including the sink.
        span_includes_sink: always true; the field is there for other readers.
        length_policy: which length M is. "total": the length of prompt and answer together. It is known at the first
            forward, so a head's window is fixed. "current": the length of the query's own prefix. Windows then grow
            with the text, and no query depends on the final length. Spans are then not rounded up to blocks, so that a
            window never moves back to a key that it has left. A cache has room for the windows at the total length.
        alphas: tokens, `[num_layers][num_kv_heads]`.
        betas: share of the length, `[num_layers][num_kv_heads]`.
        prefill: whether the prompt is read with the schedules or densely.
        measured: what the search found, for people: losses by the influence and in a validation.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    header: Header
    granularity: Literal["kv_head"] = "kv_head"
    sink: Annotated[int, Field(ge=0, le=MOST)] = 64
    block: Size = 64
    min_span: Size = 128
    span_includes_sink: Literal[True] = True
    length_policy: Literal["total", "current"] = "total"
    alphas: list[list[Tokens]]
    betas: list[list[Share]]
    prefill: Literal["sparse", "dense"] = "sparse"
    measured: dict[str, Any] = {}

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        layers, heads, kv_heads = self.num_layers, self.header.model.num_heads or 0, self.num_kv_heads
        if self.min_span <= self.sink:
            raise FieldError("min_span", f"expected more than the {self.sink} tokens of sink, got {self.min_span}")
        if heads % kv_heads:
            raise FieldError("num_kv_heads", f"{kv_heads} do not divide {heads} query heads")
        for field in ("alphas", "betas"):
            if problem := _wrong_size(getattr(self, field), layers, kv_heads):
                raise FieldError(field, problem)
        return self

    @classmethod
    def of(
        cls, shape: ModelShape, alphas: Sequence[Sequence[float]], betas: Sequence[Sequence[float]], **more: Any
    ) -> "HeadSchedules":
        """Head schedules for a model, from rules `[num_layers][num_kv_heads]`; `more` are other fields."""
        rules: dict[str, Any] = {
            name: [[float(number) for number in row] for row in rows]
            for name, rows in (("alphas", alphas), ("betas", betas))
        }
        return cls(**{"header": Header.of(KIND, shape), **rules, **more})

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.header.model.num_layers or len(self.alphas)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a layer."""
        return self.header.model.num_kv_heads or len(self.alphas[0])

    def kept(self, layer: int, length: int) -> list[int]:
        """C: the tokens that each KV head of a layer has room for, including the sink; may exceed `length`."""
        rules = zip(self.alphas[layer], self.betas[layer], strict=True)
        return [self.room(alpha, beta, length) for alpha, beta in rules]

    def room(self, alpha: float, beta: float, length: int) -> int:
        """C of one rule, with the sizes of these schedules."""
        if self.length_policy == "current":
            return self.sink + self._growing(alpha, beta, length).most
        tokens = max(min(math.trunc(alpha + beta * length), length), self.min_span)
        return self.block * -(-tokens // self.block)

    def spans(self, layer: int, length: int) -> tuple[list[int], list[int | GrowingWindow]]:
        """Sink and window of each KV head of a layer, for rows that grow to `length` tokens: see `length_policy`."""
        if self.length_policy == "current":
            rules = zip(self.alphas[layer], self.betas[layer], strict=True)
            return [self.sink] * len(self.alphas[layer]), [self._growing(*rule, length) for rule in rules]
        return [self.sink] * len(self.alphas[layer]), [kept - self.sink for kept in self.kept(layer, length)]

    def _growing(self, alpha: float, beta: float, length: int) -> GrowingWindow:
        """The window of a rule, for rows of `length` tokens. The rule is rounded to 2^-16."""
        base, slope, least = round((alpha - self.sink) * 65536), round(beta * 65536), self.min_span - self.sink
        return GrowingWindow(base, slope, least, most=max((base + slope * length) >> 16, least))

    def density(self, length: int, layers: Sequence[int] | None = None) -> float:
        """Share of the KV entries kept at a length, as the mean over the heads of `layers` (by default all)."""
        chosen = range(self.num_layers) if layers is None else layers
        return fmean(min(kept, length) / length for layer in chosen for kept in self.kept(layer, length))


def write_head_schedules(path: str | Path, schedules: HeadSchedules) -> None:
    """Write head schedules, with the rules of a layer in one line. An older file is replaced atomically."""
    data = {**schedules.header.entry(), **schedules.model_dump(exclude={"header"})}
    lines = [f" {json.dumps(key)}: {_layers(value)}" for key, value in data.items()]
    write_file(Path(path), "{\n" + ",\n".join(lines) + "\n}\n")


def _layers(value: Any) -> str:
    """The JSON of a field, one layer per line."""
    if not (isinstance(value, list) and value):
        return json.dumps(value)
    return "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]"


def read_head_schedules(path: str | Path) -> HeadSchedules:
    """Read a file that `write_head_schedules` wrote.

    Raises:
        ConfigError: the file cannot be read or is not of this format; the message names field, file and place.
    """
    return _schedules(*_read_json(path), place_of(path))


def schedules_for(path: str | Path, shape: ModelShape) -> tuple[HeadSchedules, str]:
    """Read head schedules for a model, from a file of this format or of MoA's own.

    Returns:
        The schedules, and one line about the conversion of MoA's format; empty for this format.

    Raises:
        ConfigError: the file cannot be read, is of neither format or of another model.
    """
    header, data = _read_json(path)
    if header is None and data.keys() == {"alphas", "betas"}:
        return schedules_of_moa(path, shape)
    schedules = _schedules(header, data, place_of(path))
    check_shape(schedules.header, shape, place_of(path))
    return schedules, ""


def _schedules(header: Header | None, data: dict[str, Any], place: str) -> HeadSchedules:
    """The schedules of a file.

    Raises:
        ConfigError: the file is not of this format; the message begins with `place`.
    """
    known = [name for name in HeadSchedules.model_fields if name != "header"]
    if header is None and "format" not in data:
        raise ConfigError(f"{place}: artefact: missing; {MAKE_ONE}")
    try:
        if header is None:
            known = [*_Earlier.model_fields, *known]
            header = _Earlier.model_validate(data).header()
            data = {key: value for key, value in data.items() if key not in _Earlier.model_fields}
        if "header" in data:
            raise ConfigError(f"{place}: header: unknown key; known keys: {', '.join(known)}; {MAKE_ONE}")
        return HeadSchedules.model_validate({"header": header, **data})
    except ValidationError as error:
        raise ConfigError(f"{place}: {problem_of(error, known)}; {MAKE_ONE}") from None


class _Earlier(BaseModel):
    """The fields of earlier versions that are now in the header."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    format: Literal["per-head-span/1"]
    model_type: str
    num_layers: Size
    num_query_heads: Size
    num_kv_heads: Size
    provenance: dict[str, Any] = {}

    def header(self) -> Header:
        model = MadeFor(
            model_type=self.model_type,
            num_layers=self.num_layers,
            num_heads=self.num_query_heads,
            num_kv_heads=self.num_kv_heads,
        )
        settings = {key: value for key, value in self.provenance.items() if key != "sparse_patch"}
        return Header.of_earlier(KIND, model, settings, by=self.provenance.get("sparse_patch", ""))


def schedules_of_moa(path: str | Path, shape: ModelShape) -> tuple[HeadSchedules, str]:
    """Read MoA's published head schedules for query heads: `{"alphas": [[...]], "betas": [[...]]}`, one list per layer.

    If a model has fewer KV heads, a KV head gets a rule that keeps what any of its query heads keeps, at every length
    from the shortest to the longest of `PUBLISHED_LENGTHS`. If one query head has the longest span at both ends, the
    rule is that head's. Otherwise it is the line through the longest spans at the two ends. (The maximum of several
    lines is convex, so it lies below this line.)

    Args:
        path: the file.
        shape: the model; the file does not name it.

    Returns:
        The schedules, and one line about how the reduction changed their density.

    Raises:
        ConfigError: the file cannot be read, is not of this format or is of another model.
    """
    place = place_of(path)
    _, data = _read_json(path)
    if set(data) != {"alphas", "betas"}:
        got = one_line(", ".join(data))
        raise ConfigError(f"{place}: expected only alphas and betas, as MoA publishes them, got {got}")
    heads = len(data["alphas"][0]) if _is_table(data["alphas"]) and data["alphas"] else 0
    heads = heads if heads in (shape.num_heads, shape.num_kv_heads) else shape.num_heads
    for field, rows in data.items():
        if problem := _wrong_size(rows, shape.num_layers, heads):
            raise ConfigError(f"{place}: {field}: {problem}; it was made for another model; {MAKE_ONE}")
        if problem := _out_of_range(rows):
            raise ConfigError(f"{place}: {field}: {problem}")
    of_heads = [list(zip(*rows, strict=True)) for rows in zip(data["alphas"], data["betas"], strict=True)]
    group = heads // shape.num_kv_heads
    rules = [[_longest(row[head : head + group]) for head in range(0, heads, group)] for row in of_heads]
    schedules = _checked(place, shape, rules)
    length = PUBLISHED_LENGTHS[1]
    before = fmean(min(schedules.room(*rule, length), length) / length for row in of_heads for rule in row)
    return schedules, (
        f"{path}: rules of {heads} heads as rules of {shape.num_kv_heads} KV heads: density "
        f"{schedules.density(length):.2f} at {length} tokens, {before:.2f} before"
    )


def _longest(rules: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """A rule that keeps what each of these rules keeps, at `PUBLISHED_LENGTHS` and between."""
    short, long = PUBLISHED_LENGTHS
    ends = {rule: (rule[0] + rule[1] * short, rule[0] + rule[1] * long) for rule in rules}
    low, high = (max(end[at] for end in ends.values()) for at in (0, 1))
    for rule, end in ends.items():
        if end == (low, high):
            return rule
    beta = (high - low) / (long - short)
    return low - beta * short, beta


def schedules_of_duo(
    path: str | Path, shape: ModelShape, sparsity: float, sink: int = 64, recent: int = 256
) -> tuple[HeadSchedules, str]:
    """Read DuoAttention's published head pattern: a TSV of gates, one line per layer, one column per KV head.

    Gates below 0 count as 0. A head is full if its gate is at or above the quantile `sparsity` of all gates. Of equal
    gates, those of the first layers and heads come first (the public code adds unseeded noise). With `sparsity` 0 every
    head is full, with 1 no head is.

    Args:
        path: the file.
        shape: the model.
        sparsity: share of the heads that keep only `sink` and `recent` tokens.
        sink: first tokens.
        recent: last tokens.

    Returns:
        The schedules, and how many heads are full, in one line.

    Raises:
        ConfigError: the file cannot be read, is not of this format or is of another model.
        ValueError: `sparsity` is not a share.
    """
    place = place_of(path)
    if not 0 <= sparsity <= 1:
        raise FieldError("sparsity", f"expected a share from 0 to 1, got {sparsity}")
    rows = [line.split() for line in read_artefact(path, KIND, read_text).body.split("\n") if line.strip()]
    gates = [[_gate(place, layer, number) for number in row] for layer, row in enumerate(rows)]
    if problem := _wrong_size(gates, shape.num_layers, shape.num_kv_heads):
        raise ConfigError(f"{place}: {problem}; it was made for another model; {MAKE_ONE}")
    heads = [(layer, head) for layer in range(shape.num_layers) for head in range(shape.num_kv_heads)]
    ranked = sorted(heads, key=lambda at: -gates[at[0]][at[1]])  # stable: of equal gates, the first comes first
    number = 0 if sparsity == 1 else len(heads) - math.ceil(sparsity * (len(heads) - 1))
    schedules = duo_schedules(shape, set(ranked[:number]), sink, recent)
    return schedules, f"{path}: {number} of {len(heads)} KV heads are full, the others keep {sink} + {recent} tokens"


def _gate(place: str, layer: int, text: str) -> float:
    try:
        problem = "" if math.isfinite(gate := float(text)) else f"{one_line(text)} is not finite"
    except ValueError:
        problem = f"could not convert {short(text)}"
    if problem:
        expected = "a line of numbers for each layer with tabs between"
        raise ConfigError(f"{place}: expected {expected}: {problem}, in that of layer {layer}")
    return max(gate, 0.0)


def duo_schedules(shape: ModelShape, full: set[tuple[int, int]], sink: int = 64, recent: int = 256) -> HeadSchedules:
    """Head schedules where the (layer, KV head) pairs in `full` keep everything, the others sink and recent tokens."""
    streaming = float(sink + recent), 0.0
    rules = [
        [(0.0, 1.0) if (layer, head) in full else streaming for head in range(shape.num_kv_heads)]
        for layer in range(shape.num_layers)
    ]
    return _checked("rules", shape, rules, sink=sink, min_span=max(128, sink + 64))


def _checked(
    place: str, shape: ModelShape, rules: Sequence[Sequence[tuple[float, float]]], **more: Any
) -> HeadSchedules:
    alphas, betas = ([[rule[part] for rule in row] for row in rules] for part in (0, 1))
    try:
        return HeadSchedules.of(shape, alphas, betas, **more)
    except ValidationError as error:
        raise ConfigError(f"{place}: {problem_of(error, HeadSchedules.model_fields)}") from None


def _read_json(path: str | Path) -> tuple[Header | None, dict[str, Any]]:
    header, data = read_artefact(path, KIND, read_json)
    if not isinstance(data, dict):
        raise ConfigError(f"{place_of(path)}: expected a JSON object, got {type(data).__name__}; {MAKE_ONE}")
    return header, data


def _is_table(rows: Any) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and all(type(x) in (int, float) for x in row) for row in rows
    )


def _wrong_size(rows: Any, layers: int, heads: int) -> str | None:
    """What is wrong with a table that should have one number for each layer and head, if anything."""
    if not _is_table(rows):
        return f"expected {layers} lists of {heads} numbers, got {quoted(rows)}"
    if len(rows) != layers:
        return f"expected {layers} layers, got {len(rows)}"
    for layer, row in enumerate(rows):
        if len(row) != heads:
            return f"layer {layer}: expected {heads} heads, got {len(row)}"
    return None


def _out_of_range(rows: list[list[float]]) -> str | None:
    """What is wrong with the numbers of a table, if anything: infinite, not a number, or larger than any count."""
    for layer, row in enumerate(rows):
        for head, number in enumerate(row):
            if not -MOST <= number <= MOST:
                return f"layer {layer}, head {head}: expected a number from -{MOST} to {MOST}, got {short(number)}"
    return None
