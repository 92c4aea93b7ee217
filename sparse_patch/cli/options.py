"""Helpers shared by several commands: options, their parsing, and the writing of results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sparse_patch.errors import SparsePatchError, short

MOST = 2**31 - 1  # largest number of an option

ConfigsOption = Annotated[
    list[str] | None,
    typer.Option("--config", help="A packaged configuration or a YAML file. Can be given several times."),
]
SuiteOption = Annotated[str, typer.Option(help="Suite of tasks: needle, niah, ruler, damage or all.")]
TasksOption = Annotated[
    str, typer.Option(help="Comma-separated names of tasks, instead of a suite; see `sparse-patch tasks`.")
]
LengthsOption = Annotated[str, typer.Option(help="Tokens of the prompts, comma-separated.")]
SamplesOption = Annotated[int, typer.Option(min=1, max=MOST, help="Number of prompts per task and length.")]
SeedOption = Annotated[int, typer.Option(help="Seed of texts, keys and values.")]
HaystackOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text to hide things in.", show_default="Python's help topics")
]
ModelOption = Annotated[
    str | None, typer.Option(help="Model folder, GGUF file or hub id.", show_default="examples/needle-llama")
]
PlotOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a picture and write it here (PNG).")]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="bfloat16, float16 or float32.", show_default="bfloat16 on a GPU, float32 on a CPU"),
]
ArchitectureOption = Annotated[
    str, typer.Option("--shape", help="Sizes and number of layers: llama-3.1-8b, qwen2.5-7b, qwen3-8b or needle-llama.")
]
BatchOption = Annotated[int, typer.Option(min=1, max=MOST, help="Batch size.")]
LayersOption = Annotated[
    int | None,
    typer.Option(min=1, max=MOST, help="Number of layers, to shrink the model.", show_default="as in --shape"),
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]


def shipped_model() -> Path:
    """The model in the `examples` folder of the repository."""
    path = Path(__file__).parent.parent.parent / "examples" / "needle-llama"
    if not path.is_dir():
        raise SparsePatchError(
            "--model: needle-llama ships with the repository, not with the wheel; name a model folder"
        )
    return path


def names_of(text: str) -> list[str]:
    """Split a comma-separated text into names."""
    return [name.strip() for name in text.split(",") if name.strip()]


def lengths_of(text: str, option: str = "--lengths") -> list[int]:
    """Parse comma-separated numbers of tokens; duplicates are dropped."""
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
    """Raise, before a long run, if its results cannot be written or its picture cannot be drawn.

    Raises:
        SparsePatchError: see `check_writable` and `check_picture`.
    """
    from sparse_patch.files.writing import check_writable
    from sparse_patch.plots import check_picture

    check_writable(*files, plot)
    check_picture(plot)


def write_json(path: Path | None, data: Any) -> None:
    """Write a result, completely or not at all. Its table was printed before.

    Raises:
        WriteError: the result cannot be written.
    """
    from sparse_patch.files.writing import WriteError, write_file

    if path is not None:
        try:
            write_file(path, json.dumps(data, indent=1) + "\n")
        except WriteError as error:
            raise WriteError(f"{error}; the table above is the result") from error


def write_picture(path: Path | None, draw: Callable[[Path], None], json_file: Path | None) -> None:
    """Draw a picture of a result if `path` is given, and print where it is.

    Raises:
        WriteError: the picture cannot be written.
    """
    from sparse_patch.files.writing import WriteError

    if path is None:
        return
    try:
        draw(path)
    except WriteError as error:
        raise WriteError(f"{error}; {json_file or 'the table above'} has the result") from error
    print(f"picture: {path}")
