"""The command line, `sparse-patch COMMAND`. An error prints one line and exits with 2; `--debug` shows its trace."""

import io
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparse_patch.cli import bench, calibrate, evaluation
from sparse_patch.cli.options import (
    MOST,
    JsonOption,
    ModelOption,
    PlotOption,
    check_outputs,
    shipped_model,
    write_json,
    write_picture,
)
from sparse_patch.errors import SparsePatchError, one_line, said_in_one_line

_UsageError: Any = typer.BadParameter.__base__  # click's class, or the one of typer's copy of click

app = typer.Typer(
    help="Training-free sparse attention for long prompts in Hugging Face Transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(evaluation.app)
app.add_typer(bench.app, name="bench")
app.add_typer(calibrate.app, name="calibrate")


def main() -> None:
    """Entry point of the `sparse-patch` command."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    with said_in_one_line(debug=len(arguments) < len(sys.argv) - 1):
        try:
            sys.exit(app(arguments, prog_name="sparse-patch", standalone_mode=False))
        except _UsageError as error:
            said, command = _problem(error), error.ctx.command_path if error.ctx else "sparse-patch"
            if not said:  # the help of a group was shown
                sys.exit(2)
            raise SparsePatchError(f"{said}; see `{command} --help`") from None
        except typer.Abort:
            sys.exit(1)


def _problem(error: Any) -> str:
    """What is wrong with the arguments, in one line; empty if there were no arguments."""
    return one_line(" ".join(error.format_message().split()), 200).rstrip(".")


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False) -> None:
    """List `--debug` in the help; `main` reads it at any position."""


@app.command()
def demo(
    length: Annotated[int, typer.Option(min=1024, help="Tokens of the prompt.")] = 16384,
    config: Annotated[str, typer.Option(help="A packaged configuration or a YAML file.")] = "flexprefill.yaml",
    seed: Annotated[int, typer.Option(help="Seed of the text, keys and numbers.")] = 0,
    needles: Annotated[int, typer.Option(min=1, help="How many numbers to hide and find.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="How often each prefill is timed.")] = 3,
    model: ModelOption = None,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Find numbers in a long text, with dense and with sparse attention."""
    from transformers.utils import logging as transformers_logging

    from sparse_patch.evaluation.demo import run_demo, show
    from sparse_patch.plots import plot_sparsity
    from sparse_patch.workbench.progress import progress_steps

    check_outputs(json_file, plot=plot)
    transformers_logging.disable_progress_bar()
    console = Console()
    with progress_steps(console, total=3 + 2 * repeats) as step:
        result = run_demo(model or shipped_model(), config, length, seed, needles, repeats, step)
    show(result, console)
    write_json(json_file, result.summary())
    write_picture(plot, lambda path: plot_sparsity(result.prefill_report, result.plans, path), json_file)


@app.command()
def methods(json_file: JsonOption = None) -> None:
    """List the methods and the packaged configurations."""
    from sparse_patch.config import packaged_configs
    from sparse_patch.methods.base.registry import registry

    check_outputs(json_file)
    configs = packaged_configs()
    rows = [
        {
            "method": name,
            "phases": list(method.phases),
            "config": f"{name}.yaml" if f"{name}.yaml" in configs else None,
            "summary": method.summary,
            "paper": method.paper,
            "fields": method().model_dump(exclude={"method"}),
        }
        for name, method in registry().items()
    ]
    table = Table(title="methods", title_justify="left")
    for column in ("method", "phases", "config", "what it does", "paper"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["method"], ", ".join(row["phases"]), row["config"] or "", row["summary"], row["paper"])  # type: ignore[arg-type]
    Console().print(table)
    write_json(json_file, rows)


@app.command()
def new_method(
    name: Annotated[str, typer.Argument(help="Name of the method, as in YAML: lower-case letters, digits, _.")],
    phase: Annotated[str, typer.Option(help="prefill or decode.")],
    folder: Annotated[
        Path,
        typer.Option(help="Where to write: a folder of yours, or a checkout of sparse_patch.", show_default="here"),
    ] = Path("."),
) -> None:
    """Begin a method of your own: module, YAML, oracle and a test that passes."""
    from sparse_patch.call import PHASES
    from sparse_patch.methods.base.registry import GROUP
    from sparse_patch.testing.scaffold import Scaffold

    if phase not in PHASES:
        raise SparsePatchError(f"--phase: expected prefill or decode, got {phase!r}")
    scaffold = Scaffold(name, phase, folder)
    files = scaffold.write()
    for path in files:
        print(f"wrote {path}")
    print(f"try it: python -m pytest {files[-1]}")
    if not scaffold.in_checkout:
        print(f'for YAML and lm-eval, in the pyproject.toml of your package: [project.entry-points."{GROUP}"]')
        print(f'{name} = "{name}:{scaffold.class_name}"')


@app.command()
def show(
    config: Annotated[str, typer.Argument(help="A packaged configuration or a YAML file.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a model to resolve the configuration for.")
    ] = None,
    length: Annotated[
        int, typer.Option(min=1, max=MOST, help="Sequence length for which the spans' memory is shown.")
    ] = 16384,
    json_file: JsonOption = None,
) -> None:
    """Print a configuration with all defaults and, for a model, what each layer runs and how much memory spans take."""
    import yaml

    from sparse_patch.config import load_config

    check_outputs(json_file)
    settings = load_config(config)
    console = Console()
    console.print(yaml.safe_dump(settings.settings(), sort_keys=False).rstrip(), markup=False, highlight=False)
    layers: list[dict[str, Any]] = []
    memory: dict[str, int] | None = None
    if model is not None:
        from sparse_patch.cli.inspection import inspect

        layers, kv = inspect(model, settings, length)
        table = Table(title=model, title_justify="left")
        for column in ("layer", "attention", "query heads", "KV heads", "head dim", "prefill", "decode", "role"):
            table.add_column(column, justify="right")
        for layer in layers:
            table.add_row(*(str(value) for value in layer.values()))
        console.print(table)
        if kv is not None:
            print(
                f"keys and values of {kv.length} tokens, a row: {kv.planned / 1e6:.1f} MB by the spans, "
                f"{kv.dense / 1e6:.1f} MB dense"
            )
            memory = asdict(kv)
    write_json(json_file, {"config": settings.settings(), "source": settings.source, "layers": layers, "kv": memory})


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe: a YAML file, such as those in `recipes`.")],
    dry: Annotated[bool, typer.Option("--dry-run", help="Print the commands without running them.")] = False,
) -> None:
    """Run the commands of a recipe, which reproduce a table."""
    for arguments in checked_commands(recipe):
        print(shlex.join(["sparse-patch", *arguments]), flush=True)
        if not dry:
            app(arguments, prog_name="sparse-patch", standalone_mode=False)


def checked_commands(recipe: Path, above: tuple[Path, ...] = ()) -> list[list[str]]:
    """Check all commands of a recipe before the first one runs (options and result files), and return them.

    Args:
        recipe: the recipe's file.
        above: the recipes that run this one.

    Raises:
        SparsePatchError: the recipe, one of its commands or a recipe that it runs is not valid, a result cannot be
            written, or recipes run each other in a circle.
    """
    from sparse_patch.cli.recipes import load_recipe

    if recipe.resolve() in above:
        raise SparsePatchError(f"{recipe}: runs itself, directly or through another recipe; remove that command")
    commands = load_recipe(recipe).arguments(recipe)
    for number, arguments in enumerate(commands):
        place = f"{recipe}: commands[{number}]"
        name, options = parsed(arguments, place)
        if name == "run":
            checked_commands(options["recipe"], (*above, recipe.resolve()))
        try:
            check_outputs(*(options.get(key) for key in ("json_file", "out", "file")), plot=options.get("plot"))
        except SparsePatchError as error:
            raise SparsePatchError(f"{place}: {error}") from None
    return commands


def parsed(arguments: list[str], place: str) -> tuple[str, dict[str, Any]]:
    """Parse arguments of `sparse-patch` into the command's name and its options, without running it.

    Args:
        arguments: the words after `sparse-patch`.
        place: where the arguments come from, for the message.

    Raises:
        SparsePatchError: there is no such command or option, or a value does not fit its option.
    """
    command: Any = typer.main.get_command(app)
    name, context = "sparse-patch", None
    try:
        while True:
            with redirect_stdout(io.StringIO()):  # the help may be printed
                context = command.make_context(name, list(arguments), parent=context)
            if not hasattr(command, "resolve_command"):  # not a group
                return name, context.params
            first = context._protected_args if hasattr(context, "_protected_args") else context.protected_args
            name, command, arguments = command.resolve_command(context, [*first, *context.args])
    except _UsageError as error:
        raise SparsePatchError(f"{place}: {_problem(error) or 'names no command'}") from None
    except typer.Exit:
        raise SparsePatchError(f"{place}: asks for help, which is not a command to run") from None
