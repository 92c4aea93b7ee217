"""`sparse-patch calibrate`: search the settings that a method needs for a model, and write them to a file."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from sparse_patch.cli.options import (
    JsonOption,
    LengthsOption,
    ModelOption,
    PlotOption,
    SeedOption,
    check_outputs,
    lengths_of,
    names_of,
    shipped_model,
    write_json,
    write_picture,
)

if TYPE_CHECKING:
    from sparse_patch.calibration.base import Calibration

app = typer.Typer(
    help="Search the settings that a method needs for a model, and write them to a file.", no_args_is_help=True
)


_AnswersOption = Annotated[
    Literal["task", "model"],
    typer.Option(help="Source of the tasks' answers. Texts are always continued by the model."),
]
_InfluenceOption = Annotated[
    Literal["set", "moa"],
    typer.Option(help="Influence of all far keys together (set), or the sum over single keys as in MoA's code (moa)."),
]


@app.command("minference")
def calibrate_minference(
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="JSON to write. A run that was killed continues from the file beside it."),
    ],
    model: ModelOption = None,
    length: Annotated[
        int, typer.Option(min=1024, help="Tokens of the prompt; use the length of your prompts.")
    ] = 30_000,
    seed: SeedOption = 0,
) -> None:
    """Find the pattern of each head for `minference`, on one key-value retrieval prompt."""
    from sparse_patch.calibration.minference import MInferenceCalibration

    run(MInferenceCalibration(length, seed), out, model)


@app.command("sale")
def calibrate_sale(
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Safetensors to write. A run that was killed continues from the file beside it."
        ),
    ],
    model: ModelOption = None,
    error: Annotated[
        float, typer.Option(min=0, help="Largest allowed change of a head's output (L1 norm per query).")
    ] = 0.4,
    highest: Annotated[
        float, typer.Option(min=0.0002, help="First threshold of every head; small models tolerate larger ones.")
    ] = 0.008,
    lengths: LengthsOption = "8192",
    samples: Annotated[int, typer.Option(min=1, help="Number of prompts per length.")] = 5,
    tasks: Annotated[
        str, typer.Option(help="Offline tasks of the prompts, in turn, comma-separated.")
    ] = "kv_retrieval",
    text: Annotated[Path | None, typer.Option(help="Use pieces of this text file instead of tasks.")] = None,
    numerics: Annotated[str, typer.Option(help="int8 or int4, as in prefill.numerics.")] = "int8",
    local_window: Annotated[int, typer.Option(help="Window in tokens, as in prefill.window.")] = 128,
    block_size: Annotated[
        int, typer.Option(help="64 or 128. Use the thresholds with this prefill.block_size or a larger one.")
    ] = 128,
    seed: SeedOption = 0,
) -> None:
    """Find the threshold of each head for `sale`, on long prompts."""
    from sparse_patch.calibration.sale import SaleCalibration

    calibration = SaleCalibration(
        numerics=numerics,
        window=local_window,
        block_size=block_size,
        error=error,
        highest=highest,
        lengths=tuple(lengths_of(lengths)),
        samples=samples,
        tasks=tuple(names_of(tasks)),
        seed=seed,
        text=None if text is None else str(text),
    )
    run(calibration, out, model)


@app.command("layers")
def calibrate_layers(
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="YAML to write. A run that was killed continues from the file beside it."),
    ],
    model: ModelOption = None,
    length: Annotated[int, typer.Option(min=256, help="Tokens of the prompts; use the length of your prompts.")] = 8192,
    samples: Annotated[int, typer.Option(min=1, help="Number of prompts, of five tasks in turn.")] = 5,
    seed: SeedOption = 0,
    budget: Annotated[int, typer.Option(min=1, help="Tokens that a sparse layer reads.")] = 512,
    select: Annotated[
        int, typer.Option(min=0, help="Number of layers that select again after the first selecting layer.")
    ] = 1,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Find the layers that select keys for decode, from the attention of the answers to a few long prompts."""
    from sparse_patch.calibration.layers.search import LayersCalibration
    from sparse_patch.plots import plot_layers

    run(LayersCalibration(length, samples, seed, budget, select), out, model, json_file, plot, plot_layers)


@app.command("moa")
def calibrate_moa(
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="JSON to write. A run that was killed continues from the file beside it."),
    ],
    model: ModelOption = None,
    density: Annotated[float, typer.Option(help="Largest share of the KV entries that the schedules may keep.")] = 0.5,
    lengths: Annotated[
        str, typer.Option(help="Lengths to measure at, in tokens of prompt and answer, comma-separated.")
    ] = "2048,4096,8192",
    validate_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the prompts that choose among schedules.", show_default="1.5 times the longest of --lengths"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of prompts per length.")] = 4,
    validate_samples: Annotated[int, typer.Option(min=1, help="Number of prompts that choose among schedules.")] = 3,
    tasks: Annotated[
        str, typer.Option(help="Offline tasks of the prompts, in turn, comma-separated.")
    ] = "recite,niah_multikey_2,kv_retrieval,vt",
    text: Annotated[Path | None, typer.Option(help="Use pieces of this text file instead of tasks.")] = None,
    answers: _AnswersOption = "task",
    objective: Annotated[
        Literal["log-odds", "cross-entropy"], typer.Option(help="Loss of an answer, of which influence is measured.")
    ] = "log-odds",
    influence: _InfluenceOption = "set",
    max_rules: Annotated[int, typer.Option(min=0, max=3, help="Most different rules in a layer; 0 if unlimited.")] = 0,
    plans: Annotated[int, typer.Option(min=1, help="Most schedules to validate.")] = 4,
    seed: SeedOption = 0,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Find the span of each KV head for MoA, from the influence of far keys on the answers to long prompts."""
    from sparse_patch.calibration.moa.records import Settings
    from sparse_patch.calibration.moa.search import MoACalibration
    from sparse_patch.plots import plot_spans

    settings = Settings(
        lengths=tuple(sorted(lengths_of(lengths))),
        density=density,
        validate_length=validate_length,
        samples=samples,
        validate_samples=validate_samples,
        tasks=tuple(names_of(tasks)),
        text=None if text is None else str(text),
        answers=answers,
        objective=objective,
        influence=influence,
        max_rules=max_rules or None,
        plans=plans,
        seed=seed,
    )
    run(MoACalibration(settings), out, model, json_file, plot, plot_spans)


def run(
    calibration: "Calibration[Any]",
    out: Path,
    model: str | None,
    json_file: Path | None = None,
    plot: Path | None = None,
    draw: Callable[[dict[str, Any], Path], None] = lambda data, path: None,
) -> None:
    """Run a calibration: search, print the result, and write it.

    Args:
        calibration: the search with its settings.
        out: artefact to write. A run that was killed continues from the journal beside it.
        model: folder or id; None for the shipped one.
        json_file: file for the result as JSON.
        plot: file for the picture.
        draw: draws the picture from the JSON data.

    Raises:
        SparsePatchError: a result cannot be written, a setting is not valid or does not fit the model, ...
    """
    from transformers.utils import logging as transformers_logging

    from sparse_patch.calibration.base import shape_of
    from sparse_patch.models.loading import load_model, model_name
    from sparse_patch.workbench.progress import progress_steps

    check_outputs(out, json_file, plot=plot)
    calibration.check()
    name = str(model or shipped_model())
    transformers_logging.disable_progress_bar()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    with calibration.journal(out, name) as journal:
        loaded, tokenizer = load_model(name)
        shape, model_id = shape_of(loaded), model_name(name)
        with progress_steps(console, max(0, calibration.steps(shape) - len(journal.records))) as step:
            found = calibration.search(loaded, tokenizer, journal, step)
        for part in calibration.table(found):
            console.print(part)
        calibration.write(out, found, shape, model_id)
        what = f"{calibration.makes}: {out}; use them with {calibration.used_by}: {out}"
        console.print(what, soft_wrap=True)
        if json_file is not None or plot is not None:
            data = calibration.as_json(found, shape, model_id)
            write_json(json_file, data)
            write_picture(plot, lambda path: draw(data, path), json_file)
