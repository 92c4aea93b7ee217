"""Reading files that a user names. Reading has limits, and a bad file is refused in one line that says what and where.

Only regular files are read, because a pipe would block and a device has no end. YAML is what `yaml.safe_load` takes,
with a limited number of bytes, levels and nodes; an alias counts as all the nodes that it stands for. In YAML and JSON
a key that is set twice is an error, because nobody can know which of the two is meant.
"""

import json
import os
import re
import stat
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from sparse_patch.errors import ConfigError, one_line, quoted, reason

MOST_BYTES = 16 * 2**20  # of an artefact
MOST_YAML_BYTES = 2**20
MOST_NODES = 20_000
MOST_LEVELS = 32  # of nesting
LONGEST_NUMBER = 500  # characters; Python itself refuses to read or write several thousand digits

_KEYS_ONLY = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value"  # `<<` and `=`
_WORDS = "tag:yaml.org,2002:str", "tag:yaml.org,2002:binary"


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    try:
        with open(path, "rb", opener=_open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{one_line(path)}: cannot be read: it is not a regular file")
            data = file.read(most + 1)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: the name has a NUL
        raise ConfigError(f"{one_line(path)}: cannot be read: {reason(error)}") from None
    if len(data) > most:
        raise ConfigError(f"{one_line(path)}: cannot be read: it has more than {most} bytes")
    return data


def _open(path: str, flags: int) -> int:
    """Open a file; for a pipe, do not wait for its other end."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """The text of a regular file in UTF-8; raises ConfigError as `read_bytes` does, and if it is not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{one_line(path)}: is not UTF-8 text: {error.reason} at byte {error.start}") from None


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or exceeds the limits of this module.
    """
    place, text = one_line(path), read_text(path, MOST_YAML_BYTES)
    try:
        loader = _Loader(text, place)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        at = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"{place}: not valid YAML: {one_line(said)}{at}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{place}: not valid YAML: {one_line(' '.join(str(error).split()))}") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader with limits. It constructs scalars while their place is known, so that an error can name the path."""

    def __init__(self, text: str, place: str) -> None:
        super().__init__(text)
        self.place = place
        self.path: list[str] = []  # keys that lead to the node being composed
        self.nodes = 0
        self.sizes: dict[str, int] = {}  # number of nodes that each anchor stands for

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, before = self.peek_event(), self.nodes
        self.path.append("" if index is None else str(getattr(index, "value", index)))
        if len(self.path) > MOST_LEVELS:
            self._refuse(event, f"expected at most {MOST_LEVELS} levels of nesting")
        node = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            self.nodes += 1
            if event.anchor is not None:
                self.sizes[event.anchor] = self.nodes - before
        elif event.anchor in self.sizes:
            self.nodes += self.sizes[event.anchor]
        else:
            self._refuse(event, f"the alias {quoted(event.anchor)} stands inside what it names")
        if self.nodes > MOST_NODES:
            self._refuse(event, f"expected at most {MOST_NODES} values, an alias counted as all that it names")
        if node is not None and node.tag not in self.yaml_constructors and node.tag not in _KEYS_ONLY:
            self._refuse(event, f"the tag {quoted(node.tag)} is not allowed, only plain values are")
        self.path.pop()
        return node

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        node = super().compose_scalar_node(anchor)
        if node.tag not in _WORDS and len(node.value) > LONGEST_NUMBER:
            self._refuse(node, f"expected a number of at most {LONGEST_NUMBER} characters, got {quoted(node.value)}")
        if node.tag in self.yaml_constructors:
            self.construct_object(node)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[Hashable, yaml.Node] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, "expected keys that are words, got a list or a mapping")
            key = (key_node.value,) if key_node.tag in _KEYS_ONLY else self.construct_object(key_node)
            if key in seen:
                self.path.append(key_node.value)
                lines = seen[key].start_mark.line + 1, key_node.start_mark.line + 1
                raise ConfigError(f"{self.place}: {_path(self.path)}{_twice(*lines)}")
            seen[key] = key_node
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ConfigError, yaml.YAMLError):
            raise
        except Exception:  # each kind of scalar raises its own exceptions
            kind = node.tag.rpartition(":")[2]
            self._refuse(node, f"expected a valid {kind}, got {quoted(node.value)}; put text in quotes")

    def _refuse(self, at: Any, problem: str) -> NoReturn:
        raise ConfigError(f"{self.place}: {_path(self.path)}line {at.start_mark.line + 1}: {problem}") from None


def _path(keys: Iterable[str]) -> str:
    """The keys that lead to a value, and a colon; empty for the whole file."""
    path = ".".join(key for key in keys if key)
    return f"{one_line(path)}: " if path else ""


def _twice(first: int, second: int) -> str:
    lines = f"line {first}" if first == second else f"lines {first} and {second}"
    return f"is set twice, in {lines}; keep one of them"


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; raises ConfigError as `parse_json` does, and if the file cannot be read."""
    return parse_json(read_text(path), one_line(path))


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text. Python's NaN and infinities are numbers; an integer of over 500 digits is a float.

    Args:
        text: the JSON.
        place: name of the source, for messages.

    Raises:
        ConfigError: the text is not JSON, is nested too deeply or sets a key twice; the message begins with `place`.
    """
    twice = False

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal twice
        found = dict(items)
        twice = twice or len(found) < len(items)
        return found

    try:
        data = json.loads(text, object_pairs_hook=pairs, parse_int=_integer)
    except RecursionError:
        raise ConfigError(f"{place}: expected at most {MOST_LEVELS} levels of nesting") from None
    except ValueError:
        raise ConfigError(f"{place}: is not JSON") from None
    if twice:
        raise ConfigError(f"{place}: {_set_twice(text)}")
    if _levels(data) > MOST_LEVELS:
        raise ConfigError(f"{place}: expected at most {MOST_LEVELS} levels of nesting")
    return data


def _integer(digits: str) -> float:
    return int(digits) if len(digits) <= LONGEST_NUMBER else float(digits)


def _levels(data: Any) -> int:
    """How deeply lists and mappings are nested."""
    level, row = 0, [data]
    while row := [item for item in row if isinstance(item, list | dict)]:
        level += 1
        row = [item for value in row for item in (value.values() if isinstance(value, dict) else value)]
    return level


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}:,]')


def _set_twice(text: str) -> str:
    """The message about valid JSON that sets a key twice: path and lines of the first such key."""
    path: list[Any] = []  # the key or the index at each level
    seen: list[dict[str, int]] = []  # where the keys of each level begin; empty for a list
    word = None
    for token in _JSON_TOKEN.finditer(text):
        mark = token[0]
        if mark in "[{":
            path.append(0 if mark == "[" else "")
            seen.append({})
        elif mark in "]}":
            path.pop()
            seen.pop()
        elif mark == ",":
            path[-1] = path[-1] + 1 if isinstance(path[-1], int) else ""
        elif mark == ":" and word is not None:
            path[-1] = json.loads(word[0])
            if path[-1] in seen[-1]:
                starts = seen[-1][path[-1]], word.start()
                return f"{_path(map(str, path))}{_twice(*(text.count(chr(10), 0, start) + 1 for start in starts))}"
            seen[-1][path[-1]] = word.start()
        word = token
    raise AssertionError("no key is set twice")


MOST = 2**31 - 1  # largest value of any count: the most that int32 holds
