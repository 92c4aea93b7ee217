"""lm-eval's own command line, extended by `hf-sparse` and the offline tasks."""

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from lm_eval._cli import HarnessCLI
from lm_eval.utils import setup_logging

from sparse_patch.errors import SparsePatchError, TaskError
from sparse_patch.files.writing import WriteError, check_writable

TASKS = Path(__file__).parents[1] / "lm_eval_tasks"


def main(arguments: Sequence[str]) -> None:
    """Run lm-eval's own command line, extended by `hf-sparse` and the offline tasks.

    Raises:
        SparsePatchError: lm-eval refuses the arguments.
    """
    setup_logging()
    before, sys.argv = sys.argv, ["sparse-patch lm-eval", *arguments]
    try:
        harness = HarnessCLI()
        parsed = _parsed(harness)
        if hasattr(parsed, "include_path"):
            parsed.include_path = _include_paths(parsed.include_path)
        with _results_in(getattr(parsed, "output_path", None)):
            harness.execute(parsed)
    except SparsePatchError:
        raise
    except Exception as error:  # each task may raise its own exception types
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise SparsePatchError(f"lm-eval: {kind}{' '.join(str(error).split())}") from error
    finally:
        sys.argv = before


def _parsed(harness: HarnessCLI) -> argparse.Namespace:
    """Parse lm-eval's arguments; raise TaskError instead of printing its usage if they are not valid."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return harness.parse_args()
    except SystemExit as stop:
        if not stop.code:
            raise
        problem = said.getvalue().strip().rpartition("\n")[2].rpartition(" error: ")[2]
        raise TaskError(f"lm-eval: {problem}; see `sparse-patch lm-eval run --help`") from None


@contextmanager
def _results_in(path: str | None) -> Iterator[None]:
    """For a `with` block in which lm-eval writes results: raise if writing fails, which lm-eval would only log.

    Raises:
        WriteError: the results cannot be written; raised before the block if that can be known there.
    """
    if path is None or int(os.environ.get("RANK", 0)) != 0:
        yield
        return
    folder = Path(path).parent if Path(path).suffix == ".json" else Path(path)
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    try:
        check_writable(existing / "results.json")
    except WriteError as error:
        raise WriteError(f"--output_path: {path}: cannot be written: {str(error).rpartition(': ')[2]}") from None

    def written() -> set[Path]:
        return {*folder.glob("*.json"), *folder.glob("*/*.json")}

    before = written()
    yield
    if written() <= before:
        raise WriteError(f"--output_path: {path}: no results could be written; the table above is the result")


def _include_paths(path: str | None) -> list[str]:
    """The folders of the offline tasks and of the user's tasks; lm-eval would silently skip a missing one."""
    if path is not None and not Path(path).is_dir():
        raise TaskError(f"--include_path: {path}: is not a folder")
    return [str(TASKS), *([path] if path else [])]
