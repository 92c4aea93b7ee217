"""`sparse-patch bench model`: time to first token and time per token of a whole model, through `generate`.

The model has random weights of known sizes, or is a checkpoint. Each variant generates greedily from the same random
prompt, twice: the first run compiles and warms up, the second is timed. A streamer records the time at which `generate`
hands over each token. The time per token is the median over all tokens but the first. The steps that capture a graph
take longer. They count in the slowest token and hardly move the median, because most steps replay the graph.
The median of the first run is reported too, because a user may generate only once.

The variants are the unpatched model, the model patched with `dense: best` only (our own decode kernel), and each
configuration. A variant is timed in modes, which are what a user types.

Peak memory is counted separately until the first token and after it: a cache that forgets saves memory after it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from sparse_patch.bench.common import Columns, Result, cell, configs_by_stem, result_as_json, skipped_notes, table_of
from sparse_patch.bench.model_rows import BEST, UNPATCHED, Mode, Row, against_dense, name_of, without_patch
from sparse_patch.bench.model_timing import capture_seconds, generate
from sparse_patch.bench.model_weights import Weights
from sparse_patch.config import PatchConfig, load_config
from sparse_patch.integration.patching import patched
from sparse_patch.integration.reporting import reset_report, sparsity_report
from sparse_patch.integration.transformers_internals import forget_cache_length
from sparse_patch.methods.dense import DenseMethod
from sparse_patch.model_shape import ModelShape
from sparse_patch.models.loading import check_context
from sparse_patch.workbench.machine import machine
from sparse_patch.workbench.progress import Step

DENSE = {"unpatched": UNPATCHED, "best": BEST}  # names of `--dense` -> labels of the dense variants
GRAPHS: dict[str, Mode] = {"auto": "default", "off": "eager"}  # names of `--decode-graph` -> modes of `--cache default`
_OVERRIDES: dict[Mode, dict[str, Any]] = {"default": {}, "eager": {"decode_graph": "off"}, "static": {}}
_ARGUMENTS: dict[Mode, dict[str, Any]] = {"default": {}, "eager": {}, "static": {"cache_implementation": "static"}}


@dataclass(frozen=True)
class Way:
    """One variant in one mode.

    Attributes:
        label: the variant's name in tables.
        mode: see `Row`.
        config: the configuration that the model is patched with; None if it is not patched.
    """

    label: str
    mode: Mode
    config: PatchConfig | None


@dataclass(frozen=True)
class Benchmark:
    """What to time.

    Attributes:
        weights: the model.
        lengths: tokens of the prompts.
        batch: number of rows.
        new_tokens: tokens to generate, at least 3.
        methods: name -> configuration.
        modes: see `Row`. The unpatched model has no mode "eager": it counts as "default" there.
        dtype: dtype of the weights.
        device: "cuda" or "cpu".
        chunk: prompt tokens per forward; None if one forward takes the whole prompt.
        dense: labels of the dense variants to time.
    """

    weights: Weights
    lengths: Sequence[int]
    batch: int
    new_tokens: int
    methods: dict[str, PatchConfig]
    modes: Sequence[Mode]
    dtype: torch.dtype
    device: str
    chunk: int | None = None
    dense: Sequence[str] = tuple(DENSE.values())

    def ways(self) -> list[Way]:
        """Every variant in every mode, the unpatched model once for each cache argument."""
        dense = {UNPATCHED: None, BEST: load_config(DenseMethod(), dense="best")}
        variants = {**{label: config for label, config in dense.items() if label in self.dense}, **self.methods}
        ways: dict[tuple[str, Mode], Way] = {}
        for asked in self.modes:
            for label, config in variants.items():
                mode = without_patch(asked) if config is None else asked
                ways[label, mode] = Way(label, mode, config)
        return list(ways.values())

    @property
    def steps(self) -> int:
        """Number of measurements if nothing is skipped."""
        return len(self.lengths) * len(self.ways())

    def model(self) -> PreTrainedModel:
        """The model on the device. Its answers have no end.

        Raises:
            SparsePatchError: the model cannot be loaded, or a prompt and its answer do not fit its context.
        """
        longest = max(self.lengths)
        model = self.weights.load(self.dtype, self.device, longest + self.new_tokens)
        check_context(model, longest, self.new_tokens, "--lengths")
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        return model

    def prompt(self, model: PreTrainedModel, length: int) -> torch.Tensor:
        """Random tokens of the model's vocabulary, int64 `[batch, length]`."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        return torch.randint(vocabulary, (self.batch, length), generator=generator).to(self.device)


def methods_of(sources: Sequence[str], shape: ModelShape) -> dict[str, PatchConfig]:
    """Load configurations with a sparse method, keyed by the stems of their files.

    Raises:
        ConfigError: a configuration is not valid, or does not fit a model of this shape.
        TaskError: a configuration has no sparse method to time, or two have the same stem.
    """
    configs = configs_by_stem(sources, "sparse method", _is_sparse)
    for config in configs.values():
        config.bind(shape)
    return configs


@torch.no_grad()
def bench_model(benchmark: Benchmark, progress: Step = lambda _: None) -> Result[Row]:
    """Time every variant at every length; variants that run out of memory are skipped and noted.

    Args:
        benchmark: what to time.
        progress: called with a description before each row.

    Raises:
        SparsePatchError: see `Benchmark.model`.
    """
    model, result = benchmark.model(), Result[Row]([], {})
    for length in benchmark.lengths:
        prompt, measured = benchmark.prompt(model, length), list[Row]()
        for way in benchmark.ways():
            progress(f"{way.label}, {way.mode}, {length} tokens")
            try:
                measured.append(_row(benchmark, model, prompt, way))
            except torch.OutOfMemoryError:
                what = f"{name_of(way.label, way.mode, benchmark.batch)}: out of memory"
                result.skipped.setdefault(what, []).append(length)
            _forget(model, way.mode)
        result.rows.extend(against_dense(measured))
    return result


def as_json(result: Result[Row], benchmark: Benchmark) -> dict[str, Any]:
    """The result as JSON: what was measured, on which machine, and with which configurations."""
    about = {**benchmark.weights.about, "new_tokens": benchmark.new_tokens}
    return result_as_json(result, benchmark.methods, benchmark.dtype, about)


def table(result: Result[Row], benchmark: Benchmark) -> Table:
    """A table with one line per row and one section per length."""
    about = benchmark.weights.about
    caption = (
        f"{machine()['device']}, {benchmark.dtype}, {about['shape']['layers']} layers, batch {benchmark.batch}, "
        f"weights: {about['weights']}"
    )
    columns: Columns[Row] = {
        "attention": lambda row: row.label,
        "mode": lambda row: row.mode,
        "tokens": lambda row: str(row.length),
        "first token s": lambda row: f"{row.first_token_s:.3f}",
        "ms a token": lambda row: f"{row.token_ms:.2f}",
        "first run": lambda row: f"{row.first_run_token_ms:.2f}",
        "slowest": lambda row: f"{row.slowest_token_ms:.2f}",
        "x unpatched": lambda row: cell(row.x_unpatched, 3),
        f"x {BEST}": lambda row: cell(row.x_best, 3),
        "capture s": lambda row: cell(row.capture_s, 2),
        "KV MB": lambda row: f"{row.kv_mb:.0f}",
        "planned": lambda row: f"{row.planned_mb:.0f}",
        "peak MB": lambda row: cell(row.peak_memory_mb, 0),
        "in decode": lambda row: cell(row.decode_memory_mb, 0),
    }
    return table_of("a model through generate", result.rows, columns, caption)


def notes(result: Result[Row]) -> list[str]:
    """One line for each reason of a fallback, and for each thing that did not run."""
    lines = [
        f"{row.label}, {row.mode}, {row.length} tokens: {calls} calls were dense: {reason}"
        for row in result.rows
        for reason, calls in row.fallbacks.items()
    ]
    return lines + skipped_notes(result.skipped)


def _is_sparse(config: PatchConfig) -> bool:
    return any(method is not None and method.method != "dense" for method in (config.prefill, config.decode))


def _row(benchmark: Benchmark, model: PreTrainedModel, prompt: torch.Tensor, way: Way) -> Row:
    chunk = {} if benchmark.chunk is None else {"prefill_chunk_size": benchmark.chunk}
    typed = {**_ARGUMENTS[way.mode], **chunk}
    with patched(model, way.config, **_OVERRIDES[way.mode]) if way.config is not None else nullcontext():
        first_run = generate(model, prompt, benchmark.new_tokens, typed)
        if way.config is not None:
            reset_report(model)
        run = generate(model, prompt, benchmark.new_tokens, typed)
        report = sparsity_report(model) if way.config is not None else None
    return Row(
        label=way.label,
        config=way.label if way.label in benchmark.methods else None,
        length=prompt.shape[1],
        batch=benchmark.batch,
        mode=way.mode,
        chunk=benchmark.chunk,
        first_token_s=run.times[0],
        token_ms=median(run.steps_ms),
        first_run_token_ms=median(first_run.steps_ms),
        slowest_token_ms=max(run.steps_ms),
        capture_s=None if report is None else capture_seconds(report),
        peak_memory_mb=max(run.peaks) / 2**20 if run.peaks else None,
        decode_memory_mb=run.peaks[1] / 2**20 if run.peaks else None,
        kv_mb=run.kv.allocated / 2**20,
        planned_mb=run.kv.planned / 2**20,
        fallbacks={} if report is None else report.fallbacks(),
    )


def _forget(model: PreTrainedModel, mode: Mode) -> None:
    """Free what compiled code, its graphs and caches hold: the next variant compiles anew and has the memory."""
    forget_cache_length(model)
    if torch.cuda.is_available():
        if mode == "static":
            torch.compiler.reset()
        torch.cuda.empty_cache()
