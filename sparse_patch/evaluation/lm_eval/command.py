"""lm-eval's own command line, which knows `hf-sparse` and the offline tasks."""

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
    """lm-eval's own command line, which knows `hf-sparse` and the offline tasks.

    Raises:
        SparsePatchError: lm-eval refused the arguments.
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
    except Exception as error:  # each task has exceptions of its own
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise SparsePatchError(f"lm-eval: {kind}{' '.join(str(error).split())}") from error
    finally:
        sys.argv = before


def _parsed(harness: HarnessCLI) -> argparse.Namespace:
    """lm-eval's arguments; TaskError in place of its usage if they are none."""
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
    """For a `with` block in which lm-eval writes results; it only logs it if it cannot.

    Raises:
        WriteError: they could not be written; where this can be seen before the block, it is.
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
    """The folder of the offline tasks, and the user's; lm-eval would pass over one that does not exist."""
    if path is not None and not Path(path).is_dir():
        raise TaskError(f"--include_path: {path}: is not a folder")
    return [str(TASKS), *([path] if path else [])]
