"""`sparse-patch bench model`: time to first token and time per token of a whole model, through `generate`.

The model has the sizes of a known model and random weights, which take as long as trained ones. Each variant generates
greedily from the same random prompt, twice: the first run compiles and warms up, the second is timed. A streamer
records the time at which `generate` hands over each token. The time per token is the median over all tokens but the
first.

The variants are the unpatched model, the model patched with `dense: best` only (our own decode kernel), and each
configuration. All use the same kind of cache. With a growing cache there is one more variant: the cache that
Transformers makes by default, which copies all its keys for every token.

Peak memory is counted separately until the first token and after it: a cache that forgets saves memory after it.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any, Literal, cast

import torch
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from sparse_patch.bench.common import (
    Architecture,
    Columns,
    Result,
    cell,
    configs_by_stem,
    result_as_json,
    skipped_notes,
    table_of,
)
from sparse_patch.config import PatchConfig
from sparse_patch.errors import TaskError
from sparse_patch.integration.caches.size import CacheBytes, cache_bytes
from sparse_patch.integration.generation_cache import span_cache
from sparse_patch.integration.patching import patched
from sparse_patch.integration.reporting import sparsity_report
from sparse_patch.integration.transformers_internals import forget_cache_length
from sparse_patch.workbench.machine import machine, synchronize
from sparse_patch.workbench.progress import Step

CacheKind = Literal["static", "dynamic"]
UNPATCHED, BEST, COPYING = "unpatched", "dense: best", "unpatched, DynamicCache"
DENSE = {"copying": COPYING, "unpatched": UNPATCHED, "best": BEST}  # names of `--dense` -> labels of the dense variants


@dataclass(frozen=True)
class Row:
    """The measurements of one variant at one length.

    Attributes:
        label: the row's name in tables.
        config: name of the configuration; None for the dense variants.
        length: tokens of the prompt.
        first_token_ms: time from the call of `generate` to the first token.
        token_ms: median time per token after the first.
        slowest_token_ms: longest time of a token after the first.
        peak_memory_mb: peak allocated memory, weights included, in MB of 2^20 bytes; None on a CPU.
        decode_memory_mb: the same after the first token.
        kv_mb: memory of the cache's keys and values.
        planned_mb: the part of `kv_mb` that the method's spans need; all of it without spans.
        fallbacks: reason -> number of calls that a method could not serve. Compiled decode steps are not counted.
        unpatched: `token_ms` divided by that of the unpatched model on the same kind of cache.
        best: `token_ms` divided by that of our own dense decode.
    """

    label: str
    config: str | None
    length: int
    first_token_ms: float
    token_ms: float
    slowest_token_ms: float
    peak_memory_mb: float | None
    decode_memory_mb: float | None
    kv_mb: float
    planned_mb: float
    fallbacks: dict[str, int]
    unpatched: float | None = None
    best: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """What to time.

    Attributes:
        architecture: sizes and number of layers.
        lengths: tokens of the prompts.
        batch: number of rows.
        new_tokens: tokens to generate, at least 3.
        methods: name -> configuration.
        cache: "static" (compiled on a GPU) or "dynamic" (a growing cache).
        compiled: whether `generate` may compile. It compiles only with a static cache on a GPU.
        dtype: dtype of the weights.
        device: "cuda" or "cpu".
        chunk: prompt tokens per forward; None if one forward takes the whole prompt.
        dense: labels of the dense variants to time.
    """

    architecture: Architecture
    lengths: Sequence[int]
    batch: int
    new_tokens: int
    methods: dict[str, PatchConfig]
    cache: CacheKind
    compiled: bool
    dtype: torch.dtype
    device: str
    chunk: int | None = None
    dense: Sequence[str] = tuple(DENSE.values())

    def ways(self) -> dict[str, PatchConfig | None]:
        """Label of each variant -> the configuration that it patches the model with; None if it does not patch."""
        dense = {COPYING: None, UNPATCHED: None, BEST: PatchConfig(dense="best", source=BEST)}
        if self.cache == "static":
            del dense[COPYING]
        return {**{label: config for label, config in dense.items() if label in self.dense}, **self.methods}

    @property
    def steps(self) -> int:
        """Number of measurements if nothing is skipped."""
        return len(self.lengths) * len(self.ways())

    def model(self) -> PreTrainedModel:
        """The model, with random weights, on the device."""
        torch.manual_seed(0)
        sizes, heads = self.architecture, self.architecture.heads
        config = AutoConfig.for_model(
            sizes.model_type,
            num_hidden_layers=sizes.layers,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            vocab_size=sizes.vocabulary,
            num_attention_heads=heads.heads,
            num_key_value_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            max_position_embeddings=max(self.lengths) + self.new_tokens,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        )
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
        return model

    def prompt(self, length: int) -> torch.Tensor:
        """Random tokens, int64 `[batch, length]`."""
        generator = torch.Generator().manual_seed(0)
        size = (self.batch, length)
        return torch.randint(self.architecture.vocabulary, size, generator=generator).to(self.device)


@dataclass(frozen=True)
class Generation:
    """One run of `generate`.

    Attributes:
        times: arrival of each token, in seconds after the call.
        peaks: peak bytes allocated until the first token, and after it; None on a CPU.
        kv: bytes of its cache.
    """

    times: list[float]
    peaks: tuple[int, int] | None
    kv: CacheBytes


class _Clock(BaseStreamer):
    """Records when `generate` hands over the prompt and each token, and the peak memory until the first token."""

    def __init__(self, on_gpu: bool) -> None:
        self.times: list[float] = []
        self.first_peak: int | None = None
        self._on_gpu = on_gpu

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if self._on_gpu and len(self.times) == 2:
            self.first_peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def end(self) -> None:
        pass


def methods_of(sources: Sequence[str], architecture: Architecture) -> dict[str, PatchConfig]:
    """Load configurations with a sparse method, keyed by the stems of their files.

    Raises:
        ConfigError: a configuration is not valid, or does not fit the architecture.
        TaskError: a configuration has no sparse method to time, or two have the same stem.
    """
    configs = configs_by_stem(sources, "sparse method", _is_sparse)
    for config in configs.values():
        config.bind(architecture.model_shape)
    return configs


@torch.no_grad()
def bench_model(benchmark: Benchmark, progress: Step = lambda _: None) -> Result[Row]:
    """Time every variant at every length; variants that run out of memory are skipped and noted.

    Args:
        benchmark: what to time.
        progress: called with a description before each row.

    Raises:
        TaskError: the weights do not fit the device.
    """
    try:
        model = benchmark.model()
    except torch.OutOfMemoryError:
        raise TaskError("--shape: the weights do not fit the GPU's memory; ask for fewer --layers") from None
    result = Result[Row]([], {})
    for length in benchmark.lengths:
        prompt, measured = benchmark.prompt(length), list[Row]()
        for label, config in benchmark.ways().items():
            progress(f"{label}, {length} tokens")
            try:
                measured.append(_row(benchmark, model, prompt, label, config))
            except torch.OutOfMemoryError:
                result.skipped.setdefault(f"{label}: out of memory", []).append(length)
            _forget(benchmark, model)
        result.rows.extend(_against_dense(measured))
    return result


def generate(benchmark: Benchmark, model: PreTrainedModel, prompt: torch.Tensor, label: str) -> Generation:
    """Generate greedily, and time each token."""
    clock, generating = _Clock(benchmark.device == "cuda"), cast(Any, model)  # PreTrainedModel's type has no `generate`
    extra: dict[str, Any] = {} if benchmark.chunk is None else {"prefill_chunk_size": benchmark.chunk}
    if benchmark.cache == "static":
        extra["cache_implementation"] = "static"
    elif label != COPYING:
        extra["past_key_values"] = span_cache(model, prompt.shape[1] + benchmark.new_tokens)
    synchronize()
    if benchmark.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    answer = generating.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=benchmark.new_tokens,
        do_sample=False,
        disable_compile=not benchmark.compiled,
        streamer=clock,
        return_dict_in_generate=True,
        **extra,
    )
    peaks = None if clock.first_peak is None else (clock.first_peak, torch.cuda.max_memory_allocated())
    kept = cast(Cache, answer.past_key_values)
    return Generation([at - begin for at in clock.times[1:]], peaks, cache_bytes(kept))


def is_compiled(benchmark: Benchmark) -> bool:
    """Whether `generate` compiles the decode step."""
    return benchmark.compiled and benchmark.cache == "static" and benchmark.device == "cuda"


def as_json(result: Result[Row], benchmark: Benchmark) -> dict[str, Any]:
    """The result as JSON: what was measured, on which machine, and with which configurations."""
    about = {
        "shape": asdict(benchmark.architecture),
        "weights": "random",
        "batch": benchmark.batch,
        "new_tokens": benchmark.new_tokens,
        "cache": benchmark.cache,
        "chunk": benchmark.chunk,
        "compiled": is_compiled(benchmark),
    }
    return result_as_json(result, benchmark.methods, benchmark.dtype, about)


def table(result: Result[Row], benchmark: Benchmark) -> Table:
    """A table with one line per row and one section per length."""
    about = (
        f"{machine()['device']}, {benchmark.dtype}, {benchmark.architecture.layers} layers, batch {benchmark.batch}, "
        f"{benchmark.cache} cache, {'compiled' if is_compiled(benchmark) else 'eager'}, random weights"
    )
    columns: Columns[Row] = {
        "attention": lambda row: row.label,
        "tokens": lambda row: str(row.length),
        "first token ms": lambda row: f"{row.first_token_ms:.1f}",
        "ms a token": lambda row: f"{row.token_ms:.2f}",
        "slowest": lambda row: f"{row.slowest_token_ms:.2f}",
        "x unpatched": lambda row: cell(row.unpatched, 3),
        f"x {BEST}": lambda row: cell(row.best, 3),
        "KV MB": lambda row: f"{row.kv_mb:.0f}",
        "planned": lambda row: f"{row.planned_mb:.0f}",
        "peak MB": lambda row: cell(row.peak_memory_mb, 0),
        "in decode": lambda row: cell(row.decode_memory_mb, 0),
    }
    return table_of("a model through generate", result.rows, columns, about)


def notes(result: Result[Row]) -> list[str]:
    """One line for each reason of a fallback, and for each thing that did not run."""
    lines = [
        f"{row.label}, {row.length} tokens: {calls} calls were dense: {reason}"
        for row in result.rows
        for reason, calls in row.fallbacks.items()
    ]
    return lines + skipped_notes(result.skipped)


def _is_sparse(config: PatchConfig) -> bool:
    return any(method is not None and method.method != "dense" for method in (config.prefill, config.decode))


def _row(
    benchmark: Benchmark, model: PreTrainedModel, prompt: torch.Tensor, label: str, config: PatchConfig | None
) -> Row:
    with patched(model, config) if config is not None else nullcontext():
        generate(benchmark, model, prompt, label)
        run = generate(benchmark, model, prompt, label)
        fallbacks = sparsity_report(model).fallbacks() if config is not None else {}
    steps = [1000 * (after - before) for before, after in pairwise(run.times)]
    return Row(
        label=label,
        config=label if label in benchmark.methods else None,
        length=prompt.shape[1],
        first_token_ms=1000 * run.times[0],
        token_ms=median(steps),
        slowest_token_ms=max(steps),
        peak_memory_mb=max(run.peaks) / 2**20 if run.peaks else None,
        decode_memory_mb=run.peaks[1] / 2**20 if run.peaks else None,
        kv_mb=run.kv.allocated / 2**20,
        planned_mb=run.kv.planned / 2**20,
        fallbacks=fallbacks,
    )


def _forget(benchmark: Benchmark, model: PreTrainedModel) -> None:
    """Free what compiled code, its graphs and caches hold: the next variant compiles anew and has the memory."""
    forget_cache_length(model)
    if is_compiled(benchmark):
        torch.compiler.reset()
    if benchmark.device == "cuda":
        torch.cuda.empty_cache()


def _against_dense(rows: Sequence[Row]) -> list[Row]:
    """The rows of one length with `unpatched` and `best` set: times relative to both dense variants."""
    ms = {row.label: row.token_ms for row in rows}

    def by(row: Row, label: str) -> float | None:
        return row.token_ms / ms[label] if label in ms else None

    return [replace(row, unpatched=by(row, UNPATCHED), best=by(row, BEST)) for row in rows]
