"""`sparse-patch bench`: time kernels, methods and whole models."""

import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sparse_patch.cli.options import (
    MOST,
    ArchitectureOption,
    BatchOption,
    ConfigsOption,
    DtypeOption,
    JsonOption,
    LayersOption,
    LengthsOption,
    PlotOption,
    check_outputs,
    lengths_of,
    names_of,
    shipped_model,
    write_json,
    write_picture,
)
from sparse_patch.errors import SparsePatchError, short

if TYPE_CHECKING:
    from sparse_patch.bench.model_rows import Mode
    from sparse_patch.bench.model_weights import Weights

_DEFAULT_SHAPE = "llama-3.1-8b"
_WeightsOption = Annotated[
    str | None, typer.Option(help="Model folder or hub id.", show_default="random weights of the sizes of --shape")
]
_SizesOption = Annotated[
    str | None,
    typer.Option(
        help="Sizes of random weights: llama-3.1-8b, qwen2.5-7b, qwen3-8b or needle-llama.", show_default=_DEFAULT_SHAPE
    ),
]
_CacheOption = Annotated[
    str, typer.Option(help="Cache arguments of `generate`, comma-separated: default (none) and static.")
]
_GraphOption = Annotated[
    str, typer.Option(help="`decode_graph` of patched models with `--cache default`, comma-separated: auto and off.")
]

app = typer.Typer(help="Time attention, side by side with every dense kernel that is installed.", no_args_is_help=True)


@app.command("prefill")
def bench_prefill(
    config: ConfigsOption = None,
    lengths: LengthsOption = "8192,32768",
    densities: Annotated[str, typer.Option(help="Densities of the random blocks, comma-separated.")] = "0.05,0.1,0.25",
    shape: Annotated[
        str | None,
        typer.Option(
            help="llama-3.1-8b, qwen2.5-7b, gemma3-12b, minicpm4-8b, needle-llama, "
            "or query heads, KV heads and head_dim, such as 32,8,128.",
            show_default="llama-3.1-8b, or the shape of --qkv",
        ),
    ] = None,
    dtype: DtypeOption = None,
    qkv: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Safetensors file with q, k, v [1, heads, tokens, head_dim] of one layer.",
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
    from sparse_patch.bench.qkv import file_inputs, random_inputs, recorded_inputs
    from sparse_patch.plots import plot_bench
    from sparse_patch.workbench.progress import progress_steps

    check_outputs(json_file, plot=plot)
    transformers_logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    number_type = common.dtype_of(dtype or common.default_dtype(device))
    tokens, shares = lengths_of(lengths), _densities(densities)
    size = None if shape is None else common.shape_of(shape)
    known = shape or (_DEFAULT_SHAPE if qkv is None else "")
    methods = benches.methods_of(config or [], common.ARCHITECTURES.get(known))
    if qkv is not None:
        inputs = file_inputs(qkv, size, number_type, device, tokens)
    else:
        size = size or common.SHAPES[_DEFAULT_SHAPE]
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
    write_json(json_file, data)
    write_picture(plot, lambda path: plot_bench(data, path), json_file)


@app.command("decode")
def bench_decode(
    config: ConfigsOption = None,
    shape: ArchitectureOption = "llama-3.1-8b",
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens in the caches, comma-separated.", show_default="32768,131072 on a GPU, 4096 on a CPU"
        ),
    ] = None,
    batch: BatchOption = 1,
    budgets: Annotated[str, typer.Option(help="Tokens of the random lists, comma-separated.")] = "1024,2048",
    layers: LayersOption = None,
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
) -> None:
    """Time attention of one decode step: dense kernels, random lists, and configurations (per layer and all layers)."""
    import torch

    from sparse_patch.bench import common
    from sparse_patch.bench import decode as benches
    from sparse_patch.workbench.progress import progress_steps

    check_outputs(json_file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    architecture = common.architecture_of(shape, layers)
    benchmark = benches.Benchmark(
        architecture=architecture,
        lengths=lengths_of(lengths or ("32768,131072" if device == "cuda" else "4096")),
        batch=batch,
        budgets=lengths_of(budgets, "--budgets"),
        methods=benches.methods_of(config or [], architecture),
        dtype=common.dtype_of(dtype or common.default_dtype(device)),
        device=device,
    )
    console = Console() if sys.stdout.isatty() else Console(width=120)
    with progress_steps(console, benchmark.steps) as step:
        result = benches.bench_decode(benchmark, step)
    _show_bench(console, benches.table(result, benchmark), benches.notes(result))
    write_json(json_file, benches.as_json(result, benchmark))


@app.command("model")
def bench_model(
    config: ConfigsOption = None,
    model: _WeightsOption = None,
    shape: _SizesOption = None,
    lengths: LengthsOption = "4096",
    batch: BatchOption = 1,
    new_tokens: Annotated[int, typer.Option(min=3, max=MOST, help="Tokens to generate.")] = 32,
    layers: LayersOption = None,
    cache: _CacheOption = "default",
    decode_graph: _GraphOption = "auto",
    chunk: Annotated[int | None, typer.Option(min=1, max=MOST, help="Prompt tokens per forward.")] = None,
    dense: Annotated[str, typer.Option(help="Dense variants to time too, comma-separated.")] = "unpatched,best",
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
    add: Annotated[bool, typer.Option("--add", help="Keep the rows that FILE has of other runs.")] = False,
) -> None:
    """Time a whole model through `generate`: the first token, and each token after it."""
    import torch

    from sparse_patch.bench import common
    from sparse_patch.bench import model as benches
    from sparse_patch.bench.model_rows import added, timed_in
    from sparse_patch.workbench.adding import earlier_result
    from sparse_patch.workbench.progress import progress_steps

    check_outputs(json_file)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = _weights(model, shape, layers)
    benchmark = benches.Benchmark(
        weights=weights,
        lengths=lengths_of(lengths),
        batch=batch,
        new_tokens=new_tokens,
        methods=benches.methods_of(config or [], weights.shape),
        modes=_modes(cache, decode_graph),
        dtype=common.dtype_of(dtype or common.default_dtype(device)),
        device=device,
        chunk=chunk,
        dense=[benches.DENSE[name] for name in _some_of("--dense", dense, benches.DENSE, least=0)],
    )
    old = earlier_result(json_file, "bench model", timed_in) if add else None
    if old is not None and json_file is not None:
        added(old, benches.as_json(common.Result([], {}), benchmark), json_file)  # raises if they do not fit together
    console = Console() if sys.stdout.isatty() else Console(width=180)
    with progress_steps(console, benchmark.steps) as step:
        result = benches.bench_model(benchmark, step)
    _show_bench(console, benches.table(result, benchmark), benches.notes(result))
    data = benches.as_json(result, benchmark)
    write_json(json_file, data if old is None or json_file is None else added(old, data, json_file))


def _weights(model: str | None, shape: str | None, layers: int | None) -> "Weights":
    """The model of `bench model`."""
    from sparse_patch.bench.common import architecture_of
    from sparse_patch.bench.model_weights import RandomWeights, SavedWeights

    if model is None:
        return RandomWeights(architecture_of(shape or _DEFAULT_SHAPE, layers))
    for option, value in (("--shape", shape), ("--layers", layers)):
        if value is not None:
            raise SparsePatchError(
                f"{option}: {value} is for random weights, --model has its own; leave one of them out"
            )
    return SavedWeights(model)


def _modes(caches: str, graphs: str) -> "list[Mode]":
    """What the user types in `generate`, from `--cache` and `--decode-graph`."""
    from sparse_patch.bench.model import GRAPHS

    asked, of_default = _some_of("--cache", caches, ("default", "static")), _some_of("--decode-graph", graphs, GRAPHS)
    if "default" not in asked and "off" in of_default:
        raise SparsePatchError("--decode-graph: off has no effect on a static cache; ask for --cache default too")
    modes: list[Mode] = []
    for cache in asked:
        modes += ["static"] if cache == "static" else [GRAPHS[name] for name in of_default]
    return modes


def _some_of(option: str, text: str, known: Collection[str], least: int = 1) -> list[str]:
    """Parse comma-separated names, of which at least `least` are asked for; duplicates are dropped."""
    names = names_of(text)
    if len(names) < least or not set(names) <= set(known):
        raise SparsePatchError(f"{option}: expected some of {', '.join(known)}, with commas between, got {short(text)}")
    return list(dict.fromkeys(names))


def _recorded_model() -> Path:
    """The model whose recorded attention `bench` times methods on."""
    try:
        return shipped_model()
    except SparsePatchError:
        raise SparsePatchError(
            "--qkv: name a file with q, k and v to time methods on; needle-llama, whose attention is taken else, ships "
            "with the repository, not with the wheel"
        ) from None


def _densities(text: str) -> list[float]:
    try:
        densities = [float(name) for name in names_of(text)]
    except ValueError:
        densities = []
    if not densities or not all(0 < density <= 1 for density in densities):
        raise SparsePatchError(
            f"--densities: expected shares above 0 and up to 1 with commas between, 0.05,0.1, got {text!r}"
        )
    return list(dict.fromkeys(densities))


def _show_bench(console: Console, table: Table, notes: Iterable[str]) -> None:
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False)
