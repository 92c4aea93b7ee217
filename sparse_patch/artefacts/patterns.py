"""MInference's head patterns: a JSON file that says what each head reads.

MInference publishes a list with one mapping per layer, from each head to `[pattern, columns, diagonals, score]`.
`sparse-patch calibrate minference` writes the same list under the key `layers`, beside a header.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from sparse_patch.artefacts.base import Header, MadeFor, check_shape, how_to_make, misfit, place_of, read_artefact
from sparse_patch.errors import ConfigError, quoted, short
from sparse_patch.files.reading import MOST, read_json
from sparse_patch.files.writing import write_file
from sparse_patch.model_shape import ModelShape

KIND = "minference"
MAKE_ONE = how_to_make(KIND)

Kind = Literal["vertical_and_slash", "stream_llm", "block_sparse"]


class Pattern(NamedTuple):
    """What one head reads, as in MInference's files.

    Attributes:
        kind: the pattern.
        columns: verticals, or the sink, in tokens; without meaning for block_sparse.
        diagonals: slashes, or the window, in tokens; without meaning for block_sparse.
    """

    kind: Kind
    columns: int
    diagonals: int


MISSING = Pattern("vertical_and_slash", 1000, 6096)  # for a head that a file does not have, as in the public code


class Patterns(NamedTuple):
    """The content of a file.

    Attributes:
        header: header of the file; for a published file only the number of layers is known.
        layers: the patterns of each layer, by head.
    """

    header: Header
    layers: list[dict[int, Pattern]]

    def check_shape(self, shape: ModelShape, place: str) -> None:
        """Raise ConfigError if the patterns were made for another model; the message begins with `place`."""
        check_shape(self.header, shape, place)
        for layer, heads in enumerate(self.layers):
            if heads and max(heads) >= shape.num_heads:
                raise misfit(KIND, f"layer {layer} has a head {max(heads)}", f"heads 0 to {shape.num_heads - 1}", place)


def write_patterns(path: str | Path, header: Header, layers: Sequence[Mapping[int, Sequence[Any]]]) -> None:
    """Write patterns, one layer per line. An older file is replaced atomically.

    Args:
        path: the file.
        header: the model and settings of the patterns.
        layers: for each layer, the heads that have a pattern: [pattern, columns, diagonals, score].
    """
    rows = [json.dumps({str(head): list(entry) for head, entry in heads.items()}) for heads in layers]
    head = json.dumps(header.entry())[1:-1]
    write_file(Path(path), f"{{\n {head},\n" + ' "layers": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n")


def read_patterns(path: str | Path) -> Patterns:
    """Read the patterns of a file, with a header or as MInference publishes it.

    Raises:
        ConfigError: the file cannot be read or is not of this format; the message names field, file and place.
    """
    place = place_of(path)
    header, body = read_artefact(path, KIND, read_json)
    layers = body if header is None else body.get("layers")
    if not isinstance(layers, list) or not all(isinstance(heads, dict) for heads in layers):
        raise ConfigError(f"{place}: expected a list with a mapping of heads for each layer; {MAKE_ONE}")
    found = [
        {_head(place, layer, head): _pattern(place, layer, head, entry) for head, entry in heads.items()}
        for layer, heads in enumerate(layers)
    ]
    return Patterns(header or Header.of_earlier(KIND, MadeFor(num_layers=len(layers))), found)


def _head(place: str, layer: int, head: str) -> int:
    """The index of a head. Only one spelling of it is valid, so that no head is set twice."""
    if not (head.isdecimal() and len(head) < 10 and head == str(int(head))):
        raise ConfigError(f"{place}: layer {layer}: expected the index of a head, got {short(head)}")
    return int(head)


def _pattern(place: str, layer: int, head: str, entry: Any) -> Pattern:
    place = f"{place}: layer {layer}, head {head}"
    if not isinstance(entry, list) or len(entry) < 3:
        raise ConfigError(f"{place}: expected [pattern, columns, diagonals, score], got {short(entry)}")
    kind, *sizes = entry[:3]
    if kind not in get_args(Kind):
        known = ", ".join(get_args(Kind))
        raise ConfigError(f"{place}: expected one of the patterns {known}, got {quoted(kind)}")
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ConfigError(f"{place}: expected two numbers of tokens, 0 or more, got {short(sizes)}")
    if max(sizes) > MOST:
        raise ConfigError(f"{place}: expected at most {MOST} tokens, got {short(max(sizes))}")
    return Pattern(cast(Kind, kind), *sizes)
