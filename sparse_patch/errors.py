"""The exceptions of this package, and how their messages show a user's values and other exceptions.

Every message is one line that names what is wrong and the way out.
"""

import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

LONGEST_MESSAGE = 480  # characters: with "error: " before it a line has fewer than 500
LONGEST_NAME = 160  # of a path or a key
LONGEST_VALUE = 60
_LONGEST_WORD = 60  # that can be a known one mistyped
_NO_MEMORY = re.compile(
    "(out of|allocate|enough) memory|size calculation overflowed"
)  # PyTorch has a class for GPUs only


class SparsePatchError(Exception):
    """Base of everything that this package raises on purpose. The message is one line of at most 480 characters."""

    def __str__(self) -> str:  # no `__init__`: torch.compile could not trace who raises
        return one_line(super().__str__(), LONGEST_MESSAGE)


class ConfigError(SparsePatchError, ValueError):
    """A configuration is not valid. Names the file, the path of the field, what was expected and the nearest key."""


class FieldError(ConfigError):
    """A setting is not valid. The parts of the message are data; it reads `place.field: problem; remedy`.

    Attributes:
        field: the setting; with dots if it lies inside another.
        problem: what is wrong with the setting.
        remedy: the way out; empty if the problem says it.
        place: what has the setting: a class, or a phase of a configuration; may be empty.
    """

    def __init__(self, field: str, problem: str, remedy: str = "", place: str = "") -> None:
        super().__init__(field, problem, remedy, place)
        self.field, self.problem, self.remedy, self.place = field, problem, remedy, place

    def at(self, place: str) -> "FieldError":
        """The same problem at another place."""
        return FieldError(self.field, self.problem, self.remedy, place)

    def __str__(self) -> str:
        field = ".".join(part for part in (self.place, self.field) if part)
        text = ": ".join(part for part in (field, self.problem) if part)
        return one_line(f"{text}; {self.remedy}" if self.remedy else text, LONGEST_MESSAGE)


class PatchError(SparsePatchError, RuntimeError):
    """A model cannot be patched or unpatched; the model is unchanged."""


class UnsupportedCallError(SparsePatchError, RuntimeError):
    """A sparse method cannot serve this attention call and the configuration says `on_unsupported: error`."""


class TaskError(SparsePatchError, ValueError):
    """An evaluation cannot be made or run, because a task, length, haystack or model does not fit."""


@contextmanager
def said_in_one_line(debug: bool = False) -> Iterator[None]:
    """Run a whole command in a `with` block; print an error of ours, of the system or of memory in one line.

    The exit code is then 2.

    Args:
        debug: raise the error instead.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has read enough
        _drop_output()
        sys.exit(1)
    except (SparsePatchError, OSError, MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None
        if debug or not (full or isinstance(error, SparsePatchError | OSError)):
            raise
        error = SparsePatchError(f"out of memory; ask for less: {reason(error)}") if full else error
        print(f"error: {one_line(error, LONGEST_MESSAGE)}", file=sys.stderr)
        _drop_output()
        sys.exit(2)


def _drop_output() -> None:
    """Drop output that cannot be written; otherwise Python tries again to write it at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def one_line(text: object, most: int = LONGEST_NAME) -> str:
    """Text, such as a path, as one line of at most `most` characters.

    Control characters are escaped, and the middle of a long text is cut out.
    """
    whole = str(text)
    head, tail = _escaped(whole[: most + 1]), _escaped(whole[-most:])
    if len(head) <= most:
        return head
    kept = most - len(" ... ")
    return f"{head[: kept - kept // 2]} ... {tail[len(tail) - kept // 2 :]}"


def short(value: Any, most: int = LONGEST_VALUE) -> str:
    """The repr of a value in one line of at most `most` characters. Only what is shown of the repr is computed."""
    text = ""
    for piece in _pieces(value, most):
        text += piece
        if len(text) > most:
            return f"{text[: most - 3]}..."
    return text


def described(value: Any) -> str:
    """A value with the name of its type, in one line."""
    return f"{one_line(type(value).__name__)} {short(value)}"


def quoted(value: Any) -> str:
    """`short`, in quotes for any type of value, as text from a file."""
    text = short(value)
    return text if isinstance(value, str) else f"'{text}'"


def reason(error: BaseException) -> str:
    """The message of an exception of other software in one line: the system's words, or else its first line."""
    said = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
    return one_line(said or type(error).__name__)


def _escaped(text: str) -> str:
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode("ascii") for x in text)


def _pieces(value: Any, most: int) -> Iterator[str]:
    """The parts of a repr, one after the other, so that the reader can stop early."""
    if isinstance(value, str | bytes):
        yield repr(value[: most + 1])
    elif isinstance(value, int) and value.bit_length() > 4 * most:
        yield f"<{value.bit_length()} bits>"  # Python refuses to write thousands of digits
    elif isinstance(value, dict):
        yield from _row("{}", (_pair(key, item, most) for key, item in dict.items(value)))
    elif isinstance(value, list | tuple):
        yield from _row("()" if isinstance(value, tuple) else "[]", (_pieces(item, most) for item in value))
    elif isinstance(value, set | frozenset):
        yield from _row("{}", (_pieces(item, most) for item in value))
    else:
        yield _own_repr(value)


def _row(brackets: str, items: Iterator[Iterator[str]]) -> Iterator[str]:
    yield brackets[0]
    for number, item in enumerate(items):
        if number:
            yield ", "
        yield from item
    yield brackets[1]


def _pair(key: Any, item: Any, most: int) -> Iterator[str]:
    yield from _pieces(key, most)
    yield ": "
    yield from _pieces(item, most)


def _own_repr(value: Any) -> str:
    """The repr of an object; the object's own `__repr__` may give a long text or several lines, or raise."""
    try:
        return " ".join(repr(value)[:LONGEST_MESSAGE].split())
    except Exception:
        return f"<{type(value).__name__}>"


def nearest(word: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the known word that is probably meant, or nothing."""
    if not isinstance(word, str) or len(word) > _LONGEST_WORD:
        return ""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {match[0]!r}?" if match else ""
