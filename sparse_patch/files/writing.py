"""Writing files. A target is checked before the work and replaced as a whole; a failure is one line."""

import os
from collections.abc import Sequence
from pathlib import Path

from sparse_patch.errors import SparsePatchError, one_line

_SUFFIX = ".tmp"
_FAULTS = (OSError, ValueError, RuntimeError)  # the last two are for a path with a NUL or a cycle of links


class WriteError(SparsePatchError):
    """A file cannot be written. The old file is still there."""


def check_writable(*paths: Path | None) -> None:
    """Raise before a long run if its results cannot be written. The check leaves nothing behind.

    Args:
        paths: files that will be written, each once. None is skipped.

    Raises:
        WriteError: the folder is missing or read-only, the path is a folder, the file is read-only, or a file is
            named twice.
    """
    targets: list[Path] = []
    for path in paths:
        if path is not None:
            try:
                targets.append(_checked(path, targets))
            except _FAULTS as error:
                raise WriteError(f"{one_line(path)}: cannot be written: {_reason(error)}") from None


def _checked(path: Path, others: Sequence[Path]) -> Path:
    """The target of a path, after its checks; see `check_writable`."""
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
    """Replace a file atomically: readers, a kill or a full disk find the old file or the new one, never a part.

    The target of a link is replaced, not the link. A device or a pipe is written to directly.

    Raises:
        WriteError: the file cannot be written.
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
    """Append all of a text to a file, or nothing.

    Raises:
        WriteError: the file cannot be written.
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
    """The path to write to: the target of a link. A device or a pipe keeps its name, as it may have no other."""
    return path.resolve() if is_replaced(path) else path


def is_replaced(path: Path) -> bool:
    """Whether the path is a file or nothing yet. A device or a pipe is not replaced but written to directly."""
    return path.is_file() or not path.exists()


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}{_SUFFIX}")


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    file = getattr(error, "filename", None)
    return f"{reason}: {file}" if file and str(file).endswith(_SUFFIX) else reason
