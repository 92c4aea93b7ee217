"""Files that are written: looked at before the work, replaced as a whole, one line if that fails."""

import os
from collections.abc import Sequence
from pathlib import Path

from sparse_patch.errors import SparsePatchError, one_line

_SUFFIX = ".tmp"
_FAULTS = (OSError, ValueError, RuntimeError)  # the last two for a path with a NUL or a circle of links


class WriteError(SparsePatchError):
    """A file cannot be written. What stood in its place is still there."""


def check_writable(*paths: Path | None) -> None:
    """Raise before a long run if what it makes cannot be written; leaves nothing behind.

    Args:
        paths: files that will be written, each once. None is passed over.

    Raises:
        WriteError: the folder is missing or read-only, a folder stands in the file's place, the file is read-only, or
            it is named twice.
    """
    targets: list[Path] = []
    for path in paths:
        if path is not None:
            try:
                targets.append(_checked(path, targets))
            except _FAULTS as error:
                raise WriteError(f"{one_line(path)}: cannot be written: {_reason(error)}") from None


def _checked(path: Path, others: Sequence[Path]) -> Path:
    """Where a path leads; see `check_writable`."""
    target = _target(path)
    if not target.parent.is_dir():
        raise ValueError(f"{one_line(target.parent)} is not a folder")
    if target.is_dir():
        raise ValueError("it is a folder")
    if target.exists() and not os.access(target, os.W_OK):
        raise ValueError("it is read-only; name another file")
    if is_replaced(target):
        if target in others:
            raise ValueError("another result goes there; name another file for one of them")
        _beside(target).touch()
        _beside(target).unlink()
    return target


def write_file(path: Path, content: str | bytes) -> None:
    """Replace a file at once: a reader, a kill or a full disk leaves the old one or the new one, never a part.

    What a link points at is replaced, not the link. A device or a pipe is written to as it is.

    Raises:
        WriteError: it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        target = _target(path)
        if is_replaced(target):
            _replace(target, data)
        else:
            target.write_bytes(data)
    except _FAULTS as error:
        raise WriteError(f"{one_line(path)}: cannot be written: {_reason(error)}") from error


def append_file(path: Path, text: str) -> None:
    """Add to the end of a file: all of it, or nothing.

    Raises:
        WriteError: it cannot be written.
    """
    try:
        with path.open("ab", buffering=0) as file:
            before, rest = file.tell(), text.encode()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(before)
                raise
    except _FAULTS as error:
        raise WriteError(f"{one_line(path)}: cannot be written: {_reason(error)}") from error


def _replace(target: Path, data: bytes) -> None:
    try:
        _beside(target).write_bytes(data)
        os.replace(_beside(target), target)
    except OSError:
        if _beside(target).is_file():
            _beside(target).unlink()
        raise


def _target(path: Path) -> Path:
    """What is written: what a link points at; a device or a pipe as it is named, for it may have no other name."""
    return path.resolve() if is_replaced(path) else path


def is_replaced(path: Path) -> bool:
    """Whether a file stands there, or nothing; not a device or a pipe, which is written to as it is."""
    return path.is_file() or not path.exists()


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}{_SUFFIX}")


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    file = getattr(error, "filename", None)
    return f"{reason}: {file}" if file and str(file).endswith(_SUFFIX) else reason
