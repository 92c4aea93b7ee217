"""The command line: `sparse-patch demo | methods | show`. Errors are one line and exit 2; `--debug` traces them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparse_patch.errors import SparsePatchError

app = typer.Typer(
    help="Training-free sparse attention for long prompts in Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")]


def main() -> None:
    """Entry point of the `sparse-patch` command."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments, prog_name="sparse-patch")
    except SparsePatchError as error:
        if len(arguments) < len(sys.argv) - 1:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False) -> None:
    """`--debug` is read by `main`, wherever it stands; this lists it in the help."""


@app.command()
def demo(
    length: Annotated[int, typer.Option(min=1024, help="Tokens of the prompt.")] = 16384,
    config: Annotated[str, typer.Option(help="A packaged configuration or a YAML file.")] = "flexprefill.yaml",
    seed: Annotated[int, typer.Option(help="Chooses text, keys and numbers.")] = 0,
    needles: Annotated[int, typer.Option(min=1, help="Numbers to find.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each prefill is timed.")] = 3,
    model: Annotated[str | None, typer.Option(help="Model folder or id.", show_default="examples/needle-llama")] = None,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the picture here (PNG).")] = None,
) -> None:
    """Find numbers in a long text, with dense and with sparse attention."""
    from transformers.utils import logging as transformers_logging

    from sparse_patch.demo import progress_steps, run_demo, show
    from sparse_patch.plots import plot_sparsity

    for file in (json_file, plot):
        _check_writable(file)
    transformers_logging.disable_progress_bar()
    console = Console()
    with progress_steps(console, total=3 + 2 * repeats) as step:
        result = run_demo(model or shipped_model(), config, length, seed, needles, repeats, step)
    show(result, console)
    _write_json(json_file, result.summary)
    if plot is not None:
        plot_sparsity(result.prefill_report, result.plans, plot)
        console.print(f"picture: {plot}")


@app.command()
def methods(json_file: JsonOption = None) -> None:
    """List the methods, and the configurations that ship."""
    from sparse_patch.config import packaged_configs
    from sparse_patch.methods.base import registry

    configs = packaged_configs()
    rows = [
        {
            "method": name,
            "phases": list(method.phases),
            "config": f"{name}.yaml" if f"{name}.yaml" in configs else None,
            "summary": method.summary,
            "paper": method.paper,
            "fields": {key: field.get_default() for key, field in method.model_fields.items() if key != "method"},
        }
        for name, method in registry().items()
    ]
    table = Table(title="methods", title_justify="left")
    for column in ("method", "phases", "config", "what it does", "paper"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["method"], ", ".join(row["phases"]), row["config"] or "", row["summary"], row["paper"])  # type: ignore[arg-type]
    Console().print(table)
    _write_json(json_file, lambda: rows)


@app.command()
def show(
    config: Annotated[str, typer.Argument(help="A packaged configuration or a YAML file.")],
    model: Annotated[str | None, typer.Option(help="Model folder or id to resolve it against.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Print a configuration with every default, and what each layer of a model would run."""
    import yaml

    from sparse_patch.config import load_config

    settings = load_config(config)
    console = Console()
    console.print(yaml.safe_dump(settings.settings(), sort_keys=False).rstrip(), markup=False, highlight=False)
    layers: list[dict[str, Any]] = []
    if model is not None:
        from sparse_patch.inspection import layers_of

        layers = layers_of(model, settings)
        table = Table(title=model, title_justify="left")
        for column in ("layer", "attention", "query heads", "KV heads", "head dim", "prefill", "decode"):
            table.add_column(column, justify="right")
        for layer in layers:
            table.add_row(*(str(value) for value in layer.values()))
        console.print(table)
    _write_json(json_file, lambda: {"config": settings.settings(), "source": settings.source, "layers": layers})


def shipped_model() -> Path:
    """The model of the checkout's examples folder."""
    path = Path(__file__).parent.parent / "examples" / "needle-llama"
    if not path.is_dir():
        raise SparsePatchError(
            "--model: needle-llama ships with the repository, not with the wheel; name a model folder"
        )
    return path


def _check_writable(path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise SparsePatchError(f"{path}: cannot be written: {path.absolute().parent} is not a folder")


def _write_json(path: Path | None, make: Callable[[], Any]) -> None:
    if path is None:
        return
    _check_writable(path)
    path.write_text(json.dumps(make(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
