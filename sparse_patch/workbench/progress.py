"""Progress of long work: a bar on a terminal, and no output in a pipe."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Step = Callable[[str], None]


@contextmanager
def progress_steps(console: Console, total: int) -> Iterator[Step]:
    """For a `with` block: give a function to call with a description before each step."""
    columns = (
        TextColumn("{task.description:40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("loading", total=total, completed=-1)

        def step(description: str) -> None:
            progress.update(task, description=description, advance=1)

        yield step
