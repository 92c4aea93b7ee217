"""What several commands have in common: options, how they are read, and where results go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_patch.errors import SparsePatchError, short

MOST = 2**31 - 1  # of a number

ConfigsOption = Annotated[
    list[str] | None, typer.Option("--config", help="A packaged configuration or a YAML file; give it several times.")
]
SuiteOption = Annotated[str, typer.Option(help="needle, niah, ruler or all.")]
TasksOption = Annotated[str, typer.Option(help="Names with commas between, in place of a suite; see `tasks`.")]
LengthsOption = Annotated[str, typer.Option(help="Tokens of the prompts, with commas between.")]
SamplesOption = Annotated[int, typer.Option(min=1, max=MOST, help="Prompts of each task and length.")]
SeedOption = Annotated[int, typer.Option(help="Chooses texts, keys and values.")]
HaystackOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text to hide things in.", show_default="Python's help topics")
]
ModelOption = Annotated[str | None, typer.Option(help="Model folder or id.", show_default="examples/needle-llama")]
PlotOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the picture here (PNG).")]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32.", show_default="bfloat16 on a GPU, float32 on a CPU"),
]
ArchitectureOption = Annotated[
    str, typer.Option("--shape", help="llama-3.1-8b, qwen2.5-7b, qwen3-8b or needle-llama: sizes and layers.")
]
BatchOption = Annotated[int, typer.Option(min=1, max=MOST, help="Rows of the batch.")]
LayersOption = Annotated[
    int | None, typer.Option(min=1, max=MOST, help="Layers, to shrink the model.", show_default="those of the shape")
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]


def shipped_model() -> Path:
    """The model of the checkout's examples folder."""
    path = Path(__file__).parent.parent.parent / "examples" / "needle-llama"
    if not path.is_dir():
        raise SparsePatchError(
            "--model: needle-llama ships with the repository, not with the wheel; name a model folder"
        )
    return path


def names_of(text: str) -> list[str]:
    """What stands between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def lengths_of(text: str, option: str = "--lengths") -> list[int]:
    """Numbers of tokens with commas between, none twice."""
    try:
        lengths = [int(name) for name in names_of(text)]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1 or max(lengths) > MOST:
        raise SparsePatchError(
            f"{option}: expected numbers of tokens with commas between, 4096,8192, got {short(text)}"
        )
    return list(dict.fromkeys(lengths))


def check_outputs(*files: Path | None, plot: Path | None = None) -> None:
    """Raise before a long run if what it makes cannot be written, or its picture not be drawn.

    Raises:
        SparsePatchError: see `check_writable` and `check_picture`.
    """
    from sparse_patch.files.writing import check_writable
    from sparse_patch.plots import check_picture

    check_writable(*files, plot)
    check_picture(plot)


def write_json(path: Path | None, data: Any) -> None:
    """Write a result whose table stands above: all of it, or nothing.

    Raises:
        WriteError: it cannot be written.
    """
    from sparse_patch.files.writing import WriteError, write_file

    if path is not None:
        try:
            write_file(path, json.dumps(data, indent=1) + "\n")
        except WriteError as error:
            raise WriteError(f"{error}; the table above is the result") from error


def write_picture(path: Path | None, draw: Callable[[Path], None], json_file: Path | None) -> None:
    """Draw a picture of a result, if it is asked for, and say where it is.

    Raises:
        WriteError: it cannot be written.
    """
    from sparse_patch.files.writing import WriteError

    if path is None:
        return
    try:
        draw(path)
    except WriteError as error:
        raise WriteError(f"{error}; {json_file or 'the table above'} has the result") from error
    print(f"picture: {path}")
