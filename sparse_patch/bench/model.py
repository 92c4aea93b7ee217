"""`sparse-patch bench model`: time to first token and time per token of a whole model, through `generate`.

The model has the sizes of a known one and random weights, which take as long as trained ones. Every way generates
greedily from the same random prompt, twice: the first run compiles and warms up, the second is timed. A streamer takes
the time of each token as `generate` hands it over; the time per token is the median over all but the first.

Ways: the model as it is, the model patched with dense attention only and `dense: best`, which is our own decode kernel,
and each configuration; all with the same kind of cache. With a growing cache there is one more, the cache that
Transformers makes by itself, which copies all of it for every token.

Memory is counted apart until the first token and after it: a cache that forgets pays in the second part.
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
DENSE = {"copying": COPYING, "unpatched": UNPATCHED, "best": BEST}  # dense ways by the names of `--dense`


@dataclass(frozen=True)
class Row:
    """One way of generating, at one length.

    Attributes:
        label: for tables.
        config: name of the configuration; None for the dense ways.
        length: tokens of the prompt.
        first_token_ms: from the call of `generate` to the first token.
        token_ms: median time of a token after the first.
        slowest_token_ms: the longest of them.
        peak_memory_mb: the most that was allocated, the weights included, in MB of 2^20 bytes; None on a CPU.
        decode_memory_mb: the most after the first token, likewise.
        kv_mb: what the keys and values of the cache take.
        planned_mb: what of them the method's spans have; all of them without spans.
        fallbacks: calls that a method could not serve, by reason. A compiled decode step does not count.
        unpatched: `token_ms` by that of the unpatched model on the same kind of cache.
        best: `token_ms` by that of our own dense decode.
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
        batch: rows.
        new_tokens: tokens to generate; 3 or more.
        methods: configurations by name.
        cache: "static", which is compiled on a GPU, or "dynamic", a growing one.
        compiled: whether `generate` may compile; it does with a static cache on a GPU only.
        dtype: of the weights.
        device: "cuda" or "cpu".
        chunk: tokens of the prompt that a forward takes; None for all at once.
        dense: labels of the dense ways to time.
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
        """What each way patches the model with, by label; None for nothing."""
        dense = {COPYING: None, UNPATCHED: None, BEST: PatchConfig(dense="best", source=BEST)}
        if self.cache == "static":
            del dense[COPYING]
        return {**{label: config for label, config in dense.items() if label in self.dense}, **self.methods}

    @property
    def steps(self) -> int:
        """Measurements, if nothing is skipped."""
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
        times: when each token came, in seconds after the call.
        peaks: most bytes allocated until the first token, and after it; None on a CPU.
        kv: of its cache.
    """

    times: list[float]
    peaks: tuple[int, int] | None
    kv: CacheBytes


class _Clock(BaseStreamer):
    """When `generate` handed over the prompt and then each token, and what was allocated until the first."""

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
    """Configurations with a method, by the stems of their files.

    Raises:
        ConfigError: a configuration is not valid, or does not fit the architecture.
        TaskError: it has no sparse method to time, or two have the same stem.
    """
    configs = configs_by_stem(sources, "sparse method", _is_sparse)
    for config in configs.values():
        config.bind(architecture.model_shape)
    return configs


@torch.no_grad()
def bench_model(benchmark: Benchmark, progress: Step = lambda _: None) -> Result[Row]:
    """Time every way of generating at every length; what runs out of memory is skipped and noted.

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
    """Generate greedily, with the clock running."""
    clock, generating = _Clock(benchmark.device == "cuda"), cast(Any, model)  # whose type says that it cannot generate
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
    """What was measured, on what, and of what."""
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
    """One line a row; a section for each length."""
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
    """What a method could not serve, and what did not run."""
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
    """Give back what compiled code, its graphs and caches hold: the next way compiles anew, and has the memory."""
    forget_cache_length(model)
    if is_compiled(benchmark):
        torch.compiler.reset()
    if benchmark.device == "cuda":
        torch.cuda.empty_cache()


def _against_dense(rows: Sequence[Row]) -> list[Row]:
    """The rows of one length, each against both dense ones."""
    ms = {row.label: row.token_ms for row in rows}

    def by(row: Row, label: str) -> float | None:
        return row.token_ms / ms[label] if label in ms else None

    return [replace(row, unpatched=by(row, UNPATCHED), best=by(row, BEST)) for row in rows]
