"""`sparse-patch calibrate`: what a method needs for a model, searched and written to a file."""

import sys
from pathlib import Path
from typing import Annotated, Literal

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

app = typer.Typer(
    help="Search the settings that a method needs for a model, and write them to a file.", no_args_is_help=True
)


@app.command("minference")
def calibrate_minference(
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON to write. A run that was killed goes on from beside it.")
    ],
    model: ModelOption = None,
    length: Annotated[int, typer.Option(min=1024, help="Tokens of the prompt: as many as yours have.")] = 30_000,
    seed: SeedOption = 0,
) -> None:
    """Find the pattern of each head for `minference`, on one prompt of key-value retrieval."""
    from transformers.utils import logging as transformers_logging

    from sparse_patch.calibration.minference import journal_of, search, table, write_patterns
    from sparse_patch.evaluation.generation import check_context, encode, load_model
    from sparse_patch.evaluation.tasks import TASKS
    from sparse_patch.progress import progress_steps

    check_outputs(out)
    name = str(model or shipped_model())
    transformers_logging.disable_progress_bar()
    console = Console()
    with journal_of(out, {"model": name, "length": length, "seed": seed}) as journal:
        loaded, tokenizer = load_model(name)
        check_context(loaded, length, 0, "--length")
        sample = TASKS["kv_retrieval"].sample(tokenizer, length, seed)
        layers = loaded.config.get_text_config(decoder=True).num_hidden_layers
        with progress_steps(console, layers - len(journal.records)) as step:
            found = search(loaded, encode(tokenizer, sample.prompt, sample.answer)[0], journal, step)
        console.print(table(found, length))
        write_patterns(found, layers, out)
    console.print(f"patterns: {out}; use them with prefill.calibration: {out}", soft_wrap=True)


@app.command("sale")
def calibrate_sale(
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Safetensors to write. A run that was killed goes on from beside it.")
    ],
    model: ModelOption = None,
    error: Annotated[
        float, typer.Option(min=0, help="Change of a head's output that is allowed, L1, per query.")
    ] = 0.4,
    highest: Annotated[
        float, typer.Option(min=0.0002, help="Threshold that every head begins with; small models bear larger ones.")
    ] = 0.008,
    lengths: LengthsOption = "8192",
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 5,
    tasks: Annotated[str, typer.Option(help="Offline tasks that the prompts are of, in turn.")] = "kv_retrieval",
    text: Annotated[Path | None, typer.Option(help="Take pieces of this text file in place of tasks.")] = None,
    numerics: Annotated[str, typer.Option(help="int8 or int4, as prefill.numerics.")] = "int8",
    local_window: Annotated[int, typer.Option(help="Tokens, as prefill.local_window.")] = 128,
    block_size: Annotated[
        int, typer.Option(help="64 or 128, as prefill.block_size: that or more when it is used.")
    ] = 128,
    seed: SeedOption = 0,
) -> None:
    """Find the threshold of each head for `sale`, on long prompts."""
    from transformers.utils import logging as transformers_logging

    from sparse_patch.calibration import sale
    from sparse_patch.config import load_config
    from sparse_patch.evaluation.generation import load_model
    from sparse_patch.methods.sale import Sale
    from sparse_patch.methods.sale_thresholds import write_thresholds
    from sparse_patch.model_shape import ModelShape
    from sparse_patch.progress import progress_steps

    check_outputs(out)
    settings = {"numerics": numerics, "local_window": local_window, "block_size": block_size}
    method = load_config({"prefill": {"method": "sale", "min_length": 0, **settings}}).prefill
    assert isinstance(method, Sale)
    name = str(model or shipped_model())
    settings["error"] = error
    about = {"model": name, **settings, "highest": highest, "lengths": lengths, "samples": samples, "tasks": tasks}
    about |= {"seed": seed, "text": None if text is None else str(text)}
    transformers_logging.disable_progress_bar()
    console = Console()
    with sale.journal_of(out, about) as journal:
        loaded, tokenizer = load_model(name)
        if text is None:
            prompts = sale.generated_prompts(loaded, tokenizer, names_of(tasks), lengths_of(lengths), samples, seed)
        else:
            prompts = sale.text_prompts(loaded, tokenizer, text, lengths_of(lengths), samples)
        shape = ModelShape.of(loaded.config, loaded.config.get_text_config(decoder=True).num_hidden_layers)
        with progress_steps(console, shape.num_layers * len(prompts) - len(journal.records)) as step:
            found = sale.search(loaded, prompts, error, journal, step, method, highest)
        tau = sale.thresholds(found, shape.num_layers, shape.num_heads)
        more = {key: str(value) for key, value in about.items() if key not in settings}
        console.print(sale.table(found, error))
        write_thresholds(
            out, tau, shape, numerics=numerics, local_window=local_window, block_size=block_size, error=error, more=more
        )
    console.print(f"thresholds: {out}; use them with prefill.calibration: {out}", soft_wrap=True)


@app.command("layers")
def calibrate_layers(
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="YAML to write. A run that was killed goes on from beside it.")
    ],
    model: ModelOption = None,
    length: Annotated[int, typer.Option(min=256, help="Tokens of the prompts: as many as yours have.")] = 8192,
    samples: Annotated[int, typer.Option(min=1, help="Prompts: of four tasks in turn.")] = 4,
    seed: SeedOption = 0,
    budget: Annotated[int, typer.Option(min=1, help="Tokens that a sparse layer reads.")] = 512,
    select: Annotated[int, typer.Option(min=0, help="Layers that select again, after the first selecting one.")] = 1,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Find the layers that select keys for decode, from the attention of a few long prompts' answers."""
    from transformers.utils import logging as transformers_logging

    from sparse_patch.calibration import layers
    from sparse_patch.evaluation.generation import load_model
    from sparse_patch.plots import plot_layers
    from sparse_patch.progress import progress_steps

    check_outputs(out, json_file, plot=plot)
    name = str(model or shipped_model())
    name = Path(name).resolve().name if Path(name).is_dir() else name
    about = {"model": name, "length": length, "seed": seed, "budget": budget}
    transformers_logging.disable_progress_bar()
    console = Console() if sys.stdout.isatty() else Console(width=120)
    with layers.journal_of(out, about) as journal:
        loaded, tokenizer = load_model(model or shipped_model())
        layers.check_number(select, layers.model_of(loaded)["num_layers"])
        prompts = layers.samples_of(tokenizer, length, samples, seed)
        with progress_steps(console, sum(number not in journal.records for number in range(samples))) as step:
            measured = layers.measure(loaded, tokenizer, prompts, budget, journal, step)
        curves = layers.Curves.of(measured)
        choice = layers.choose(curves, select)
        about |= {"samples": samples}
        console.print(layers.table(curves, choice, about))
        console.print(layers.summary(choice), highlight=False)
        layers.write_layers(layers.as_yaml(curves, choice, layers.model_of(loaded), about), out)
        console.print(f"layers: {out}; use them with decode.calibration: {out}", soft_wrap=True)
        data = layers.as_json(curves, choice, layers.model_of(loaded), about, measured)
        write_json(json_file, data)
        write_picture(plot, lambda path: plot_layers(data, path), json_file)


@app.command("moa")
def calibrate_moa(
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON to write. A run that was killed goes on from beside it.")
    ],
    model: ModelOption = None,
    density: Annotated[float, typer.Option(help="Share of the KV entries that a plan keeps, at most.")] = 0.5,
    lengths: Annotated[
        str, typer.Option(help="Tokens of prompt and answer to measure at, with commas between.")
    ] = "2048,4096,8192",
    validate_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the prompts that choose among plans.", show_default="half as many again as the longest"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 4,
    validate_samples: Annotated[int, typer.Option(min=1, help="Prompts that choose among plans.")] = 3,
    tasks: Annotated[
        str, typer.Option(help="Offline tasks that the prompts are of, in turn.")
    ] = "recite,niah_multikey_2,kv_retrieval,vt",
    text: Annotated[Path | None, typer.Option(help="Take pieces of this text file in place of tasks.")] = None,
    answers: Annotated[
        Literal["task", "model"], typer.Option(help="Who answers the tasks; the model always goes on with texts.")
    ] = "task",
    objective: Annotated[
        Literal["log-odds", "cross-entropy"], typer.Option(help="What an answer loses, where influence is measured.")
    ] = "log-odds",
    influence: Annotated[
        Literal["set", "moa"], typer.Option(help="Of all far keys together, or the sum of each alone as in MoA's code.")
    ] = "set",
    max_rules: Annotated[int, typer.Option(min=0, max=3, help="Different rules in a layer; 0 for any number.")] = 0,
    plans: Annotated[int, typer.Option(min=1, help="Most plans that are validated.")] = 4,
    seed: SeedOption = 0,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Find the span of each KV head for MoA, from the influence of far keys on the answers to long prompts."""
    from transformers.utils import logging as transformers_logging

    from sparse_patch.calibration.moa.optimise import require_scipy
    from sparse_patch.calibration.moa.records import Settings, journal_of
    from sparse_patch.calibration.moa.report import as_json, spans_table, table
    from sparse_patch.calibration.moa.search import search
    from sparse_patch.evaluation.generation import load_model
    from sparse_patch.methods.span_plans import write_span_rules
    from sparse_patch.plots import plot_spans
    from sparse_patch.progress import progress_steps

    check_outputs(out, json_file, plot=plot)
    require_scipy()
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
    name = str(model or shipped_model())
    transformers_logging.disable_progress_bar()
    console = Console() if sys.stdout.isatty() else Console(width=160)
    with journal_of(out, {"model": name, **settings.measured}) as journal:
        loaded, tokenizer = load_model(name)
        with progress_steps(console, settings.steps - len(journal.records)) as step:
            found = search(loaded, tokenizer, settings, journal, step)
        console.print(table(found))
        console.print(spans_table(found))
        write_span_rules(out, found.chosen.rules)
        console.print(f"plan: {out}; use it with both.calibration: {out}", soft_wrap=True)
        if json_file is not None or plot is not None:
            data = as_json(found)
            write_json(json_file, data)
            write_picture(plot, lambda path: plot_spans(data, path), json_file)
