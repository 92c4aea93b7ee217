"""`sparse-patch eval`, `tasks`, `export` and `lm-eval`: the effect of sparsity on answers."""

import io
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparse_patch.cli.options import (
    ConfigsOption,
    HaystackOption,
    JsonOption,
    LengthsOption,
    ModelOption,
    PlotOption,
    SamplesOption,
    SeedOption,
    SuiteOption,
    TasksOption,
    check_outputs,
    lengths_of,
    names_of,
    shipped_model,
    write_json,
    write_picture,
)
from sparse_patch.errors import SparsePatchError

if TYPE_CHECKING:
    from sparse_patch.evaluation.results import Row

app = typer.Typer()


@app.command("eval")
def evaluate(
    config: ConfigsOption = None,
    model: ModelOption = None,
    suite: SuiteOption = "needle",
    tasks: TasksOption = "",
    lengths: LengthsOption = "4096",
    samples: SamplesOption = 10,
    seed: SeedOption = 0,
    haystack: HaystackOption = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the rows as JSON. A run that was killed continues from there."
        ),
    ] = None,
    plot: PlotOption = None,
    add: Annotated[bool, typer.Option("--add", help="Keep the rows that FILE has of other configurations.")] = False,
) -> None:
    """Compare configurations with dense attention on the offline tasks: scores or damage, density and seconds."""
    from transformers.utils import logging as transformers_logging

    from sparse_patch.evaluation.results import Record, add_to, as_json
    from sparse_patch.evaluation.suite import Evaluation, configurations, header
    from sparse_patch.evaluation.suite import evaluate as run_evaluation
    from sparse_patch.models.loading import load_model, model_name
    from sparse_patch.plots import plot_accuracy
    from sparse_patch.workbench.adding import earlier_result
    from sparse_patch.workbench.journal import Journal
    from sparse_patch.workbench.progress import progress_steps
    from sparse_patch.workbench.prompts import read_haystack
    from sparse_patch.workbench.tasks import tasks_of

    check_outputs(json_file, plot=plot)
    evaluation = Evaluation(
        configs=configurations(config or []),
        tasks=tasks_of(suite, names_of(tasks)),
        lengths=lengths_of(lengths),
        samples=samples,
        seed=seed,
        haystack=None if haystack is None else read_haystack(haystack),
    )
    name = str(model or shipped_model())
    about = header(model_name(name), evaluation, None if haystack is None else str(haystack))
    old = earlier_result(json_file, "eval", _read_rows) if add else None
    if old is not None and json_file is not None:
        # Before the work: raise if the results do not fit together.
        add_to(old, as_json([], about, evaluation.configs), json_file)
    transformers_logging.disable_progress_bar()
    console = Console() if sys.stdout.isatty() else Console(width=120)
    with Journal[Record].beside(json_file, about, Record) as journal:
        loaded, tokenizer = load_model(name)
        with progress_steps(console, evaluation.missing(journal)) as step:
            rows = run_evaluation(loaded, tokenizer, evaluation, journal, step)
        _show_rows(rows, evaluation.lengths, console)
        data = as_json(rows, about, evaluation.configs)
        if old is not None and json_file is not None:
            data = add_to(old, data, json_file)
        write_json(json_file, data)
        write_picture(plot, lambda path: plot_accuracy(data, path), json_file)


@app.command()
def tasks(json_file: JsonOption = None) -> None:
    """List the offline tasks and their suites."""
    from sparse_patch.workbench.tasks import SUITES, TASKS

    check_outputs(json_file)
    rows = [
        {"task": name, "asked": task.summary, "suites": [suite for suite, names in SUITES.items() if name in names]}
        for name, task in TASKS.items()
    ]
    table = Table("task", "what is asked for", "suites", title="tasks", title_justify="left")
    for row in rows:
        table.add_row(str(row["task"]), str(row["asked"]), ", ".join(row["suites"]))
    Console().print(table)
    write_json(json_file, rows)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="JSON-lines file to write: prompt, expected strings, answer.")],
    tokenizer: Annotated[str | None, typer.Option(help="Folder or id.", show_default="examples/needle-llama")] = None,
    suite: SuiteOption = "needle",
    tasks: TasksOption = "",
    lengths: LengthsOption = "4096",
    samples: SamplesOption = 10,
    seed: SeedOption = 0,
    haystack: HaystackOption = None,
) -> None:
    """Write the prompts of the offline tasks to a file."""
    from sparse_patch.evaluation.suite import Evaluation
    from sparse_patch.models.loading import load_tokenizer
    from sparse_patch.workbench.prompts import read_haystack
    from sparse_patch.workbench.tasks import export_jsonl, tasks_of

    check_outputs(file)
    text = None if haystack is None else read_haystack(haystack)
    evaluation = Evaluation({}, tasks_of(suite, names_of(tasks)), lengths_of(lengths), samples, seed, text)
    counter = load_tokenizer(tokenizer or shipped_model(), "--tokenizer")
    number = export_jsonl((evaluation.sample(counter, *prompt) for prompt in evaluation.prompts()), file)
    Console().print(f"{number} prompts: {file}")


@app.command(
    "lm-eval", context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval, with `--model hf-sparse --model_args pretrained=M,config=FILE` and `--tasks needle` available."""
    try:
        if _showed_lm_eval_help(context.args):
            return
        from sparse_patch.evaluation.lm_eval import main
    except ImportError as error:
        raise SparsePatchError(f'lm-eval: {error}; pip install "sparse_patch[eval]"') from None
    main(context.args)


def _show_rows(rows: "Sequence[Row]", lengths: Sequence[int], console: Console) -> None:
    from sparse_patch.evaluation.results import summaries, tables

    for length in lengths:
        console.print(*tables(rows, length))
    console.print(*summaries(rows))


def _showed_lm_eval_help(arguments: Sequence[str]) -> bool:
    """Show lm-eval's own help, which needs no PyTorch, if it is asked for; return whether it was shown."""
    if not {"-h", "--help"} & set(arguments):
        return False
    from lm_eval._cli import HarnessCLI

    before, sys.argv = sys.argv, ["sparse-patch lm-eval", *arguments]
    try:
        with redirect_stderr(io.StringIO()):  # wrong arguments are reported later, in one line
            HarnessCLI().parse_args()
    except SystemExit as stop:
        return not stop.code
    finally:
        sys.argv = before
    return False


def _read_rows(data: Any) -> None:
    """Read what `--add` needs of a result."""
    _ = [config["fingerprint"] for config in data["configs"].values()]
    _ = {(row["config"], row["task"], row["length"]): row for row in data["rows"]}
