"""`--add`: the results of several runs in one file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparse_patch.errors import SparsePatchError, TaskError, one_line, short
from sparse_patch.files.reading import read_json

_PARTS = {"configs", "rows", "skipped"}  # what a run adds; everything else is the same in all runs of a file


def earlier_result(path: Path | None, command: str, look: Callable[[Any], object]) -> dict[str, Any] | None:
    """The content of a result file; None if there is no file yet.

    Args:
        path: the file of `--json`.
        command: the command that writes such files, for messages.
        look: reads what `--add` needs; raises ValueError, KeyError, TypeError or AttributeError for another file.

    Raises:
        SparsePatchError: no file is named, or it is no result of the command.
    """
    if path is None:
        raise SparsePatchError("--add: needs --json FILE, whose rows are kept")
    if not path.is_file():
        return None
    try:
        data: dict[str, Any] = read_json(path)
        look({**data, "configs": {**data["configs"]}})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SparsePatchError(
            f"{one_line(path)}: --add: is no result of `sparse-patch {command}`; name another file"
        ) from None
    return data


def check_same_run(old: Mapping[str, Any], new: Mapping[str, Any], path: Path, config: Callable[[Any], object]) -> None:
    """Raise if two results cannot be in one file.

    Args:
        old: the earlier result.
        new: the new one.
        path: the file, for the message.
        config: what must be equal in a configuration that both have.

    Raises:
        TaskError: the runs had different prompts, models or machines, or used one label for two configurations.
    """
    for key in new:
        if key not in _PARTS and old.get(key) != new[key]:
            raise TaskError(
                f"{one_line(path)}: --add: has {key} {short(old.get(key))}, this run has {short(new[key])}; "
                "write another file"
            )
    for label in old["configs"].keys() & new["configs"].keys():
        if config(old["configs"][label]) != config(new["configs"][label]):
            raise TaskError(f"{one_line(path)}: --add: {label!r} was another configuration there; rename this one")
