"""`sparse-patch bench`: time kernels, methods and whole models."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

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
from sparse_patch.errors import SparsePatchError

_DEFAULT_SHAPE = "llama-3.1-8b"

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
    shape: ArchitectureOption = "llama-3.1-8b",
    lengths: LengthsOption = "4096",
    batch: BatchOption = 1,
    new_tokens: Annotated[int, typer.Option(min=3, max=MOST, help="Tokens to generate.")] = 32,
    layers: LayersOption = None,
    cache: Annotated[str, typer.Option(help="Kind of KV cache: static or dynamic.")] = "static",
    eager: Annotated[
        bool, typer.Option("--eager", help="Do not compile. By default a static cache on a GPU is compiled.")
    ] = False,
    chunk: Annotated[int | None, typer.Option(min=1, max=MOST, help="Prompt tokens per forward.")] = None,
    dense: Annotated[str, typer.Option(help="Dense variants to time too, comma-separated.")] = "copying,unpatched,best",
    dtype: DtypeOption = None,
    json_file: JsonOption = None,
) -> None:
    """Time a model with random weights through `generate`: the first token, and each token after it."""
    import torch

    from sparse_patch.bench import common
    from sparse_patch.bench import model as benches
    from sparse_patch.workbench.progress import progress_steps

    check_outputs(json_file)
    if cache not in ("static", "dynamic"):
        raise SparsePatchError(f"--cache: expected static or dynamic, got {cache!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    architecture = common.architecture_of(shape, layers)
    benchmark = benches.Benchmark(
        architecture=architecture,
        lengths=lengths_of(lengths),
        batch=batch,
        new_tokens=new_tokens,
        methods=benches.methods_of(config or [], architecture),
        cache="static" if cache == "static" else "dynamic",
        compiled=not eager,
        dtype=common.dtype_of(dtype or common.default_dtype(device)),
        device=device,
        chunk=chunk,
        dense=[_dense_way(name, benches.DENSE) for name in names_of(dense)],
    )
    console = Console() if sys.stdout.isatty() else Console(width=140)
    with progress_steps(console, benchmark.steps) as step:
        result = benches.bench_model(benchmark, step)
    _show_bench(console, benches.table(result, benchmark), benches.notes(result))
    write_json(json_file, benches.as_json(result, benchmark))


def _recorded_model() -> Path:
    """The model whose recorded attention `bench` times methods on."""
    try:
        return shipped_model()
    except SparsePatchError:
        raise SparsePatchError(
            "--qkv: name a file with q, k and v to time methods on; needle-llama, whose attention is taken else, ships "
            "with the repository, not with the wheel"
        ) from None


def _dense_way(name: str, ways: dict[str, str]) -> str:
    if name not in ways:
        raise SparsePatchError(f"--dense: expected some of {', '.join(ways)}, with commas between, got {name!r}")
    return ways[name]


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
