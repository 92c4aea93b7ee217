"""The records of a run, kept in a file so that a run that was killed continues where it stopped."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter
from typing_extensions import Self

from sparse_patch.errors import TaskError, one_line, short
from sparse_patch.files.reading import read_bytes
from sparse_patch.files.writing import WriteError, append_file, check_writable, is_replaced, write_file

_MOST_BYTES = 2**30
R = TypeVar("R", bound=Any)  # a dataclass with a `key`


@dataclass
class Journal(Generic[R]):
    """The records of a run in a file: one JSON object per line, after a header that identifies the run.

    A line that a killed run left unfinished is dropped. A `with` block of the journal lasts until the result is
    written. The end of the block removes the file; if the result cannot be written, the error says that the records are
    kept. Without a path, records are kept only in memory.

    Attributes:
        path: the file.
        header: the facts that two runs must share for their records to be merged.
        record: type of the records: a dataclass or a union of dataclasses.
        option: the command-line option that names the result, for messages.
        records: `key` of a record -> the record.

    Raises:
        TaskError: the file is not a journal, or belongs to another run.
        WriteError: the file cannot be written.
    """

    path: Path | None
    header: dict[str, Any]
    record: Any
    option: str = "--json"
    records: dict[Any, R] = field(default_factory=dict)

    @classmethod
    def beside(cls, result: Path | None, header: dict[str, Any], record: Any, option: str = "--json") -> Self:
        """The journal beside the result file. If the result is a pipe or a device, records are kept only in memory."""
        if result is None or not is_replaced(result):
            return cls(None, header, record, option)
        return cls(result.with_name(f"{result.name}.unfinished"), header, record, option)

    def __post_init__(self) -> None:
        check_writable(self.path)
        if self.path is None or not self.path.exists():
            return
        try:
            data = read_bytes(self.path, _MOST_BYTES)
            whole = data[: data.rfind(b"\n") + 1]
            header, *records = whole.decode().splitlines() or [json.dumps(self.header)]
            adapter: TypeAdapter[R] = TypeAdapter(self.record)
            self.records = {record.key: record for record in map(adapter.validate_python, map(json.loads, records))}
            known = json.loads(header)
            differences = list(_differences(known, json.loads(json.dumps(self.header))))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            raise TaskError(
                f"{one_line(self.path)}: is no journal of an unfinished run; delete it or write {self.option} elsewhere"
            ) from None
        if differences:
            raise TaskError(
                f"{one_line(self.path)}: is of an unfinished run with {differences[0]}; "
                f"delete it or write {self.option} to another file"
            )
        if whole != data:
            write_file(self.path, whole)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.path is None:
            return
        if error is None:
            self.path.unlink(missing_ok=True)
        elif isinstance(error, WriteError) and self.records:
            raise WriteError(
                f"{error}; measurements are kept in {one_line(self.path)}; run the same command to continue"
            ) from error

    def add(self, record: R) -> None:
        """Keep a record.

        Raises:
            WriteError: the record cannot be written. Earlier records are kept.
        """
        if self.path is not None:
            lines = [] if self.path.exists() and self.path.stat().st_size else [self.header]
            append_file(self.path, "".join(json.dumps(line) + "\n" for line in [*lines, asdict(record)]))
        self.records[record.key] = record


def _differences(theirs: Any, ours: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the differences between the headers of two runs."""
    for key, value in ours.items():
        their = theirs.get(key)
        if isinstance(value, dict) and isinstance(their, dict):
            yield from _differences(their, value, f"{prefix}{key}.")
        elif their != value:
            yield f"{prefix}{key} {short(their)}, this one has {short(value)}"
