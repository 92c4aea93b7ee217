"""The command line, `sparse-patch COMMAND`. Errors are one line and exit 2; `--debug` traces them."""

import json
import sys
from collections.abc import Callable, Iterable
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

bench = typer.Typer(help="Time attention, side by side with every dense kernel present.", no_args_is_help=True)
app.add_typer(bench, name="bench")
calibrate = typer.Typer(help="Search the settings that a method needs for a model, and write them to a file.")
app.add_typer(calibrate, name="calibrate", no_args_is_help=True)

ConfigsOption = Annotated[
    list[str] | None, typer.Option("--config", help="A packaged configuration or a YAML file; give it several times.")
]
SuiteOption = Annotated[str, typer.Option(help="needle, niah, ruler or all.")]
TasksOption = Annotated[str, typer.Option(help="Names with commas between, in place of a suite; see `tasks`.")]
LengthsOption = Annotated[str, typer.Option(help="Tokens of the prompts, with commas between.")]
SamplesOption = Annotated[int, typer.Option(min=1, help="Prompts of each task and length.")]
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
BatchOption = Annotated[int, typer.Option(min=1, help="Rows of the batch.")]
LayersOption = Annotated[
    int | None, typer.Option(min=1, help="Layers, to shrink the model.", show_default="those of the shape")
]
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
    model: ModelOption = None,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Find numbers in a long text, with dense and with sparse attention."""
    from transformers.utils import logging as transformers_logging

    from sparse_patch.demo import run_demo, show
    from sparse_patch.plots import plot_sparsity
    from sparse_patch.progress import progress_steps

    _check_writable(json_file, plot)
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
            "fields": method().model_dump(exclude={"method"}),  # type: ignore[call-arg]
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
        for column in ("layer", "attention", "query heads", "KV heads", "head dim", "prefill", "decode", "role"):
            table.add_column(column, justify="right")
        for layer in layers:
            table.add_row(*(str(value) for value in layer.values()))
        console.print(table)
    _write_json(json_file, lambda: {"config": settings.settings(), "source": settings.source, "layers": layers})


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
            "--json", metavar="FILE", help="Write the rows as JSON. A run that was killed goes on from there."
        ),
    ] = None,
    plot: PlotOption = None,
    add: Annotated[bool, typer.Option("--add", help="Keep what FILE has of other configurations.")] = False,
) -> None:
    """Measure configurations on the offline tasks, beside dense attention: scores, density and seconds."""
    from transformers.utils import logging as transformers_logging

    from sparse_patch.evaluation.generation import load_model
    from sparse_patch.evaluation.journal import Journal
    from sparse_patch.evaluation.prompts import read_haystack
    from sparse_patch.evaluation.results import Record, add_to, as_json, summary, table
    from sparse_patch.evaluation.suite import Evaluation, configurations, header
    from sparse_patch.evaluation.suite import evaluate as run_evaluation
    from sparse_patch.evaluation.tasks import tasks_of
    from sparse_patch.plots import plot_accuracy, require_matplotlib
    from sparse_patch.progress import progress_steps

    _check_writable(json_file, plot)
    if plot is not None:
        require_matplotlib()
    evaluation = Evaluation(
        configs=configurations(config or []),
        tasks=tasks_of(suite, _names(tasks)),
        lengths=_lengths(lengths),
        samples=samples,
        seed=seed,
        haystack=None if haystack is None else read_haystack(haystack),
    )
    name = str(model or shipped_model())
    about = header(
        Path(name).resolve().name if Path(name).is_dir() else name,
        evaluation,
        None if haystack is None else str(haystack),
    )
    old = _earlier_result(json_file) if add else None
    if old is not None and json_file is not None:
        add_to(old, as_json([], about, evaluation.configs), json_file)  # whether they go together, before the work
    journal: Journal[Record] = Journal(json_file and json_file.with_name(f"{json_file.name}.unfinished"), about)
    transformers_logging.disable_progress_bar()
    loaded, tokenizer = load_model(name)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    with progress_steps(console, evaluation.missing(journal)) as step:
        rows = run_evaluation(loaded, tokenizer, evaluation, journal, step)
    for length in evaluation.lengths:
        console.print(table(rows, length))
    console.print(summary(rows))
    data = as_json(rows, about, evaluation.configs)
    if json_file is not None:
        data = data if old is None else add_to(old, data, json_file)
        _write_result(json_file, data)
        journal.remove()
    if plot is not None:
        plot_accuracy(data, plot)
        console.print(f"picture: {plot}")


@bench.command("prefill")
def bench_prefill(
    config: ConfigsOption = None,
    lengths: LengthsOption = "8192,32768",
    densities: Annotated[str, typer.Option(help="Densities of random blocks, with commas between.")] = "0.05,0.1,0.25",
    shape: Annotated[
        str | None,
        typer.Option(
            help="llama-3.1-8b, qwen2.5-7b, gemma3-12b, needle-llama, or query heads, KV heads and head_dim: 32,8,128.",
            show_default="llama-3.1-8b, or that of --qkv",
        ),
    ] = None,
    dtype: DtypeOption = None,
    qkv: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Safetensors with q, k, v [1, heads, tokens, head_dim] of one layer.",
            show_default="recorded from needle-llama if there is a --config, else random",
        ),
    ] = None,
    json_file: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Time one layer's prefill attention: dense kernels, block-sparse kernels, and methods with their selection."""
    import torch
    from transformers.utils import logging as transformers_logging

    from sparse_patch.bench import common
    from sparse_patch.bench import prefill as benches
    from sparse_patch.evaluation.recording import file_inputs, random_inputs, recorded_inputs
    from sparse_patch.plots import plot_bench, require_matplotlib
    from sparse_patch.progress import progress_steps

    _check_writable(json_file, plot)
    if plot is not None:
        require_matplotlib()
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    number_type = common.dtype_of(dtype or common.default_dtype(device))
    tokens, shares, methods = _lengths(lengths), _densities(densities), benches.methods_of(config or [])
    size = None if shape is None else common.shape_of(shape)
    if qkv is not None:
        inputs = file_inputs(qkv, size, number_type, device, tokens)
    else:
        size = size or common.SHAPES["llama-3.1-8b"]
        inputs = (
            recorded_inputs(_recorded_model(), size, number_type, device, tokens)
            if methods
            else random_inputs(size, number_type, device)
        )
    benchmark = benches.Benchmark(inputs, tokens, shares, methods, device)
    console = Console() if sys.stdout.isatty() else Console(width=140)
    with progress_steps(console, benchmark.steps) as step:
        result = benches.bench_prefill(benchmark, step)
    _show_bench(console, benches.table(result, benchmark, number_type), benches.notes(result))
    data = benches.as_json(result, benchmark, number_type)
    _write_result(json_file, data)
    if plot is not None:
        plot_bench(data, plot)
        console.print(f"picture: {plot}")


@bench.command("decode")
def bench_decode(
    config: ConfigsOption = None,
    shape: ArchitectureOption = "llama-3.1-8b",
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the caches, with commas between.", show_default="32768,131072 on a GPU, 4096 on a CPU"
        ),
    ] = None,
    batch: BatchOption = 1,
    budgets: Annotated[str, typer.Option(help="Tokens of random lists, with commas between.")] = "1024,2048",
    layers: LayersOption = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
) -> None:
    """Time one token's attention: dense kernels, lists, and configurations layer by layer and as a whole stack."""
    import torch

    from sparse_patch.bench import common
    from sparse_patch.bench import decode as benches
    from sparse_patch.progress import progress_steps

    _check_writable(json_file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    architecture = common.architecture_of(shape, layers)
    benchmark = benches.Benchmark(
        architecture=architecture,
        lengths=_lengths(lengths or ("32768,131072" if device == "cuda" else "4096")),
        batch=batch,
        budgets=_lengths(budgets, "--budgets"),
        methods=benches.methods_of(config or [], architecture),
        dtype=common.dtype_of(dtype or common.default_dtype(device)),
        device=device,
    )
    console = Console() if sys.stdout.isatty() else Console(width=120)
    with progress_steps(console, benchmark.steps) as step:
        result = benches.bench_decode(benchmark, step)
    _show_bench(console, benches.table(result, benchmark), benches.notes(result))
    _write_result(json_file, benches.as_json(result, benchmark))


@bench.command("model")
def bench_model(
    config: ConfigsOption = None,
    shape: ArchitectureOption = "llama-3.1-8b",
    lengths: LengthsOption = "4096",
    batch: BatchOption = 1,
    new_tokens: Annotated[int, typer.Option(min=3, help="Tokens to generate.")] = 32,
    layers: LayersOption = None,
    cache: Annotated[str, typer.Option(help="static or dynamic.")] = "static",
    eager: Annotated[bool, typer.Option("--eager", help="Never compile; a static cache on a GPU does else.")] = False,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
) -> None:
    """Time a model with random weights through `generate`: to the first token, and for each token after it."""
    import torch

    from sparse_patch.bench import common
    from sparse_patch.bench import model as benches
    from sparse_patch.progress import progress_steps

    _check_writable(json_file)
    if cache not in ("static", "dynamic"):
        raise SparsePatchError(f"--cache: expected static or dynamic, got {cache!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    architecture = common.architecture_of(shape, layers)
    benchmark = benches.Benchmark(
        architecture=architecture,
        lengths=_lengths(lengths),
        batch=batch,
        new_tokens=new_tokens,
        methods=benches.methods_of(config or [], architecture),
        cache="static" if cache == "static" else "dynamic",
        compiled=not eager,
        dtype=common.dtype_of(dtype or common.default_dtype(device)),
        device=device,
    )
    console = Console() if sys.stdout.isatty() else Console(width=140)
    with progress_steps(console, benchmark.steps) as step:
        result = benches.bench_model(benchmark, step)
    _show_bench(console, benches.table(result, benchmark), benches.notes(result))
    _write_result(json_file, benches.as_json(result, benchmark))


@app.command()
def tasks(json_file: JsonOption = None) -> None:
    """List the offline tasks and the suites that they are in."""
    from sparse_patch.evaluation.tasks import SUITES, TASKS

    rows = [
        {"task": name, "asked": task.summary, "suites": [suite for suite, names in SUITES.items() if name in names]}
        for name, task in TASKS.items()
    ]
    table = Table("task", "what is asked for", "suites", title="tasks", title_justify="left")
    for row in rows:
        table.add_row(str(row["task"]), str(row["asked"]), ", ".join(row["suites"]))
    Console().print(table)
    _write_json(json_file, lambda: rows)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="JSON lines to write: prompt, expected strings, answer.")],
    tokenizer: Annotated[str | None, typer.Option(help="Folder or id.", show_default="examples/needle-llama")] = None,
    suite: SuiteOption = "needle",
    tasks: TasksOption = "",
    lengths: LengthsOption = "4096",
    samples: SamplesOption = 10,
    seed: SeedOption = 0,
    haystack: HaystackOption = None,
) -> None:
    """Write the prompts of the offline tasks to a file."""
    from sparse_patch.evaluation.generation import load_tokenizer
    from sparse_patch.evaluation.prompts import read_haystack
    from sparse_patch.evaluation.suite import Evaluation
    from sparse_patch.evaluation.tasks import export_jsonl, tasks_of

    _check_writable(file)
    text = None if haystack is None else read_haystack(haystack)
    evaluation = Evaluation({}, tasks_of(suite, _names(tasks)), _lengths(lengths), samples, seed, text)
    counter = load_tokenizer(tokenizer or shipped_model(), "--tokenizer")
    number = export_jsonl((evaluation.sample(counter, *prompt) for prompt in evaluation.prompts()), file)
    Console().print(f"{number} prompts: {file}")


@calibrate.command("minference")
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

    _check_writable(out)
    name = str(model or shipped_model())
    journal = journal_of(out, {"model": name, "length": length, "seed": seed})
    transformers_logging.disable_progress_bar()
    loaded, tokenizer = load_model(name)
    check_context(loaded, length, 0, "--length")
    sample = TASKS["kv_retrieval"].sample(tokenizer, length, seed)
    layers = loaded.config.get_text_config(decoder=True).num_hidden_layers
    console = Console()
    with progress_steps(console, layers - len(journal.records)) as step:
        found = search(loaded, encode(tokenizer, sample.prompt, sample.answer)[0], journal, step)
    write_patterns(found, layers, out)
    journal.remove()
    console.print(table(found, length))
    console.print(f"patterns: {out}; use them with prefill.calibration: {out}", soft_wrap=True)


@calibrate.command("sale")
def calibrate_sale(
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="Safetensors to write. A run that was killed goes on from beside it.")
    ],
    model: ModelOption = None,
    error: Annotated[
        float, typer.Option(min=0, help="Change of a head's output that is allowed, L1, per query.")
    ] = 0.4,
    lengths: LengthsOption = "8192",
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 5,
    tasks: Annotated[str, typer.Option(help="Offline tasks that the prompts are of, in turn.")] = "kv_retrieval",
    text: Annotated[Path | None, typer.Option(help="Take pieces of this text file in place of tasks.")] = None,
    numerics: Annotated[str, typer.Option(help="int8 or int4, as prefill.numerics.")] = "int8",
    local_window: Annotated[int, typer.Option(help="Tokens, as prefill.local_window.")] = 128,
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

    _check_writable(out)
    asked = {"method": "sale", "numerics": numerics, "local_window": local_window, "min_length": 0}
    method = load_config({"prefill": asked}).prefill
    assert isinstance(method, Sale)
    name = str(model or shipped_model())
    settings = {"numerics": numerics, "local_window": local_window, "error": error}
    about = {"model": name, **settings, "lengths": lengths, "samples": samples, "tasks": tasks, "seed": seed}
    about["text"] = None if text is None else str(text)
    journal = sale.journal_of(out, about)
    transformers_logging.disable_progress_bar()
    loaded, tokenizer = load_model(name)
    if text is None:
        prompts = sale.generated_prompts(loaded, tokenizer, _names(tasks), _lengths(lengths), samples, seed)
    else:
        prompts = sale.text_prompts(loaded, tokenizer, text, _lengths(lengths), samples)
    shape = ModelShape.of(loaded.config, loaded.config.get_text_config(decoder=True).num_hidden_layers)
    console = Console()
    with progress_steps(console, shape.num_layers * len(prompts) - len(journal.records)) as step:
        found = sale.search(loaded, prompts, error, journal, step, method)
    tau = sale.thresholds(found, shape.num_layers, shape.num_heads)
    more = {key: str(value) for key, value in about.items() if key not in settings}
    write_thresholds(out, tau, shape, numerics=numerics, local_window=local_window, error=error, more=more)
    journal.remove()
    console.print(sale.table(found, error))
    console.print(f"thresholds: {out}; use them with prefill.calibration: {out}", soft_wrap=True)


@calibrate.command("layers")
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
    from sparse_patch.plots import plot_layers, require_matplotlib
    from sparse_patch.progress import progress_steps

    _check_writable(out, json_file, plot)
    if plot is not None:
        require_matplotlib()
    name = str(model or shipped_model())
    name = Path(name).resolve().name if Path(name).is_dir() else name
    about = {"model": name, "length": length, "seed": seed, "budget": budget}
    journal = layers.journal_of(out, about)
    transformers_logging.disable_progress_bar()
    loaded, tokenizer = load_model(model or shipped_model())
    layers.check_number(select, layers.model_of(loaded)["num_layers"])
    prompts = layers.samples_of(tokenizer, length, samples, seed)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    with progress_steps(console, sum(number not in journal.records for number in range(samples))) as step:
        measured = layers.measure(loaded, tokenizer, prompts, budget, journal, step)
    curves = layers.Curves.of(measured)
    choice = layers.choose(curves, select)
    about |= {"samples": samples}
    layers.write_layers(layers.as_yaml(curves, choice, layers.model_of(loaded), about), out)
    data = layers.as_json(curves, choice, layers.model_of(loaded), about, measured)
    console.print(layers.table(curves, choice, about))
    console.print(layers.summary(choice), highlight=False)
    console.print(f"layers: {out}; use them with decode.calibration: {out}", soft_wrap=True)
    _write_result(json_file, data)
    if plot is not None:
        plot_layers(data, plot)
        console.print(f"picture: {plot}")
    journal.remove()


@app.command(
    "lm-eval", context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False
)
def lm_eval(context: typer.Context) -> None:
    """lm-eval's command line, with `--model hf-sparse --model_args pretrained=M,config=FILE` and `--tasks needle`."""
    try:
        from sparse_patch.evaluation.lm_eval import main
    except ImportError as error:
        raise SparsePatchError(f'lm-eval: {error}; pip install "sparse_patch[eval]"') from None
    main(context.args)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file of `recipes`.")],
    dry: Annotated[bool, typer.Option("--dry-run", help="Print the commands and run none.")] = False,
) -> None:
    """Run the commands of a recipe: one command reproduces one table."""
    from sparse_patch.recipes import load_recipe

    for arguments in load_recipe(recipe).arguments(recipe):
        print(f"sparse-patch {' '.join(arguments)}", flush=True)
        if not dry:
            app(arguments, prog_name="sparse-patch", standalone_mode=False)


def shipped_model() -> Path:
    """The model of the checkout's examples folder."""
    path = Path(__file__).parent.parent / "examples" / "needle-llama"
    if not path.is_dir():
        raise SparsePatchError(
            "--model: needle-llama ships with the repository, not with the wheel; name a model folder"
        )
    return path


def _recorded_model() -> Path:
    """The model whose attention `bench` times methods on."""
    try:
        return shipped_model()
    except SparsePatchError:
        raise SparsePatchError(
            "--qkv: name a file with q, k and v to time methods on; needle-llama, whose attention is taken else, ships "
            "with the repository, not with the wheel"
        ) from None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _lengths(text: str, option: str = "--lengths") -> list[int]:
    try:
        lengths = [int(name) for name in _names(text)]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 1:
        raise SparsePatchError(f"{option}: expected numbers of tokens with commas between, 4096,8192, got {text!r}")
    return list(dict.fromkeys(lengths))


def _densities(text: str) -> list[float]:
    try:
        densities = [float(name) for name in _names(text)]
    except ValueError:
        densities = []
    if not densities or not all(0 < density <= 1 for density in densities):
        raise SparsePatchError(
            f"--densities: expected shares above 0 and up to 1 with commas between, 0.05,0.1, got {text!r}"
        )
    return list(dict.fromkeys(densities))


def _earlier_result(path: Path | None) -> dict[str, Any] | None:
    """What a result file has, for `--add`; None where there is none yet."""
    if path is None:
        raise SparsePatchError("--add: needs --json FILE, whose rows are kept")
    if not path.is_file():
        return None
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data["rows"], data["configs"]
    except (ValueError, KeyError, TypeError):
        raise SparsePatchError(f"{path}: --add: is no result of `sparse-patch eval`; name another file") from None
    return data


def _check_writable(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise SparsePatchError(f"{path}: cannot be written: {path.absolute().parent} is not a folder")
        if path is not None and path.is_dir():
            raise SparsePatchError(f"{path}: cannot be written: it is a folder")


def _write_result(path: Path | None, data: dict[str, Any]) -> None:
    """Write what a long run measured: all of it, or nothing."""
    from sparse_patch.evaluation.journal import write_atomically

    if path is not None:
        write_atomically(path, json.dumps(data, indent=1) + "\n")


def _show_bench(console: Console, table: Table, notes: Iterable[str]) -> None:
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)


def _write_json(path: Path | None, make: Callable[[], Any]) -> None:
    if path is None:
        return
    _check_writable(path)
    path.write_text(json.dumps(make(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
