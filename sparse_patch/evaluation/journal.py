"""The records of a run in a file, so that a run that was killed goes on where it stopped."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from sparse_patch.errors import TaskError
from sparse_patch.evaluation.results import Record

R = TypeVar("R", bound=Any)  # a dataclass with a `key`


def _record(data: dict[str, Any]) -> Any:
    pairs = {key: tuple(data[key]) for key in ("found", "right", "prefill", "decode")}
    return Record(**{**data, **pairs})


@dataclass
class Journal(Generic[R]):
    """The records of a run in a file, one JSON object a line after a header that says what run it is.

    A line that a killed run left unfinished is dropped. Without a path, records are kept in memory only.

    Attributes:
        path: the file.
        header: what two runs must have in common for their records to go together.
        parse: makes a record of its JSON object; by default one of an evaluation.
        option: the option of the command line that names the result, for messages.
        records: by their `key`.

    Raises:
        TaskError: the file is no journal, or of another run.
    """

    path: Path | None
    header: dict[str, Any]
    parse: Callable[[dict[str, Any]], R] = _record
    option: str = "--json"
    records: dict[Any, R] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path is None:
            return
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        try:
            header, *records = (json.loads(line) for line in whole.splitlines()) if whole else (self.header,)
            self.records = {record.key: record for record in map(self.parse, records)}
            self._check(header)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, TaskError):
                raise
            raise TaskError(
                f"{self.path}: is no journal of an unfinished run; delete it or write {self.option} elsewhere"
            ) from None
        if whole != text:
            write_atomically(self.path, whole)

    def add(self, record: R) -> None:
        self.records[record.key] = record
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                if file.tell() == 0:
                    file.write(json.dumps(self.header) + "\n")
                file.write(json.dumps(asdict(record)) + "\n")

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _check(self, header: dict[str, Any]) -> None:
        for key, value in self.header.items():
            if header.get(key) != value:
                raise TaskError(
                    f"{self.path}: is of an unfinished run with {key} {header.get(key)!r}, this one has {value!r}; "
                    f"delete it or write {self.option} to another file"
                )


def write_atomically(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a kill, sees the old one or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
