"""`sparse-patch bench prefill`: every dense kernel, every block-sparse kernel and whole methods, side by side.

At each length all of them run on the same queries, keys and values in one process. Times are medians after a warm-up,
from CUDA events on a GPU and from the wall clock on a CPU. FLOP are counted over the (query, key) pairs that are
computed: 4 * head_dim per pair and query head. A dense kernel computes the causal triangle.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from rich.table import Table

from sparse_patch.bench.common import (
    Architecture,
    Columns,
    Result,
    cell,
    configs_by_stem,
    measured,
    result_as_json,
    rows_of,
    settings_of,
    skipped_notes,
    table_of,
)
from sparse_patch.bench.qkv import Inputs
from sparse_patch.call import AttentionCall, causal_pairs
from sparse_patch.config import BoundConfig, PatchConfig
from sparse_patch.errors import TaskError, UnsupportedCallError
from sparse_patch.model_shape import ModelShape
from sparse_patch.ops.attention import block_sparse, dense
from sparse_patch.ops.attention.table import OPS
from sparse_patch.plans import BlockGrid, BlockPlan, Dense
from sparse_patch.workbench.machine import machine
from sparse_patch.workbench.progress import Step

BASELINES = {  # key in the JSON -> field of a row, and its name in messages
    "fastest_dense": ("speedup", "the fastest dense kernel"),
    "flash2": ("speedup_flash2", "FlashAttention-2"),
}
_BLOCK = 128
_UNKNOWN = ModelShape("unknown", num_layers=1, num_heads=1, num_kv_heads=1, hidden_size=1)
_FLASH2 = "flash2"


@dataclass(frozen=True)
class Row:
    """The measurements of one kernel or method at one length.

    Attributes:
        kind: "dense" (a dense kernel), "blocks" (a block-sparse kernel on random blocks) or "method" (selection and
            kernel).
        label: the row's name in tables and pictures.
        kernel: the dense kernel or block-sparse backend that ran.
        config: name of the method's configuration; None if the row has none.
        length: tokens.
        density: computed share of the causal triangle, mean over heads.
        ms: time of the kernel only.
        tflops_effective: TFLOP/s of the kernel only, over the pairs that were computed.
        selection_ms: time of the method's `plan` only; None if the row has no method.
        total_ms: time of selection and kernel together, timed as one.
        speedup: time of the fastest dense kernel at this length divided by `total_ms`; None if no dense kernel ran.
        speedup_flash2: the same against FlashAttention-2; None if it did not run.
        peak_memory_mb: peak memory that one run allocates, output included; None on a CPU.
    """

    kind: Literal["dense", "blocks", "method"]
    label: str
    kernel: str
    config: str | None
    length: int
    density: float
    ms: float
    tflops_effective: float
    selection_ms: float | None
    total_ms: float
    speedup: float | None = None
    speedup_flash2: float | None = None
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """What to time.

    Attributes:
        inputs: the source of the calls.
        lengths: numbers of tokens.
        densities: densities of the random blocks, as shares of the causal triangle.
        methods: name -> configuration whose prefill method is timed.
        device: "cuda" or "cpu".
    """

    inputs: Inputs
    lengths: Sequence[int]
    densities: Sequence[float]
    methods: dict[str, BoundConfig]
    device: str

    @property
    def dense_kernels(self) -> tuple[str, ...]:
        return dense.KERNELS if self.device == "cuda" else ("sdpa",)

    @property
    def backends(self) -> tuple[str, ...]:
        return ("flash", "triton") if self.device == "cuda" else ("torch",)

    @property
    def steps(self) -> int:
        """Number of rows if nothing is skipped."""
        each = len(self.dense_kernels) + len(self.backends) * len(self.densities) + len(self.methods)
        return len(self.lengths) * each

    def ways(self, call: AttentionCall) -> Iterator[tuple[str, Callable[[], Row]]]:
        """Yield the label and the measurement of every row of one length."""
        for kernel in self.dense_kernels:
            yield kernel, partial(_dense_row, call, kernel)
        for density in self.densities:
            for backend in self.backends:
                label = f"{backend}, {100 * density:g} %"
                yield label, partial(_blocks_row, call, label, backend, density)
        for name, config in self.methods.items():
            yield name, partial(_method_row, call, name, config)


def methods_of(sources: Sequence[str], architecture: Architecture | None = None) -> dict[str, BoundConfig]:
    """Load configurations with a sparse prefill method, keyed by the stems of their files.

    Args:
        sources: files or packaged names.
        architecture: what they are resolved for; what is timed is its layer 0. None if it is not known: then no
            configuration may name a file, which is one of a model.

    Raises:
        ConfigError: a configuration is not valid, or does not fit the architecture.
        TaskError: a configuration has no prefill method to time, or two have the same stem.
    """
    configs = configs_by_stem(
        sources,
        "sparse prefill method",
        lambda config: config.prefill is not None and config.prefill.method != "dense",
    )
    shape = _UNKNOWN if architecture is None else architecture.model_shape
    if architecture is None:
        _check_no_files(configs)
    return {name: config.bind(shape) for name, config in configs.items()}


def _check_no_files(configs: Mapping[str, PatchConfig]) -> None:
    for name, config in configs.items():
        if config.prefill is not None and any(getattr(config.prefill, field) for field in config.prefill.files):
            raise TaskError(
                f"--config: {name}: names a calibration, which is one of a model; give its sizes by --shape"
            )


@torch.no_grad()
def bench_prefill(benchmark: Benchmark, progress: Step = lambda _: None) -> Result[Row]:
    """Time every kernel and method at every length; calls that one of them does not support are skipped and noted.

    Args:
        benchmark: what to time.
        progress: called with a description before each row.
    """
    result = Result[Row]([], {})
    for length in benchmark.lengths:
        call = benchmark.inputs.make(length)
        result.rows.extend(_with_speedups(rows_of(benchmark.ways(call), length, result.skipped, progress)))
    return result


def random_plan(call: AttentionCall, density: float) -> BlockPlan:
    """A plan of 128-blocks: the diagonal, the first column, and random blocks up to a density of about `density`."""
    grid = BlockGrid.of(call, _BLOCK)
    blocks = grid.num_key_blocks
    inside = (blocks - 1) * (blocks - 2) / 2  # blocks neither on the diagonal nor in the first column
    wanted = density * blocks**2 / 2 - blocks / 2 - (blocks - 1)  # a diagonal block counts half
    generator = torch.Generator(call.q.device).manual_seed(0)
    chance = torch.rand(1, call.q.shape[1], blocks, blocks, generator=generator, device=call.q.device)
    chosen = chance < (wanted / inside if inside else 0)
    chosen[..., 0] = True
    chosen.diagonal(dim1=-2, dim2=-1).fill_(True)
    return BlockPlan.from_blocks(chosen, grid)


def break_even(rows: Sequence[Row]) -> dict[str, dict[str, int | None]]:
    """The smallest measured length at which each method is faster than each baseline that ran; None if never."""
    found: dict[str, dict[str, int | None]] = {}
    for name in dict.fromkeys(row.config for row in rows if row.config is not None):
        for baseline, (field, _) in BASELINES.items():
            speedups = [(row.length, getattr(row, field)) for row in rows if row.config == name]
            if any(speedup is not None for _, speedup in speedups):
                faster = [length for length, speedup in speedups if speedup is not None and speedup > 1]
                found.setdefault(name, {})[baseline] = min(faster, default=None)
    return found


def as_json(result: Result[Row], benchmark: Benchmark, dtype: torch.dtype) -> dict[str, Any]:
    """The result as JSON: what was measured, on which machine, and with which configurations."""
    about = {"qkv": benchmark.inputs.about, "break_even": break_even(result.rows)}
    written = result_as_json(result, settings_of(benchmark.methods), dtype, about)
    written["machine"]["shape"] = asdict(benchmark.inputs.shape)
    return written


def table(result: Result[Row], benchmark: Benchmark, dtype: torch.dtype) -> Table:
    """A table with one line per row; the text below it describes the queries, keys and values."""
    about = f"{machine()['device']}, {dtype}, heads and head_dim {benchmark.inputs.shape}; {benchmark.inputs.about}"
    columns: Columns[Row] = {
        "kernel": lambda row: row.label,
        "tokens": lambda row: str(row.length),
        "density": lambda row: f"{row.density:.3f}",
        "ms": lambda row: f"{row.ms:.3f}",
        "TFLOP/s": lambda row: f"{row.tflops_effective:.4g}",
        "selection ms": lambda row: cell(row.selection_ms, 3),
        "total ms": lambda row: f"{row.total_ms:.3f}",
        "x fastest dense": lambda row: cell(row.speedup, 2),
        "x flash2": lambda row: cell(row.speedup_flash2, 2),
        "peak MB": lambda row: cell(row.peak_memory_mb, 0),
    }
    return table_of("prefill attention of one layer", result.rows, columns, about)


def notes(result: Result[Row]) -> list[str]:
    """The break-even lengths, and one line for each thing that did not run."""
    lines = [
        f"{name} is faster than {BASELINES[baseline][1]} "
        + (f"from {length} tokens" if length else "at no measured length")
        for name, lengths in break_even(result.rows).items()
        for baseline, length in lengths.items()
    ]
    return lines + skipped_notes(result.skipped)


def _dense_row(call: AttentionCall, kernel: str) -> Row:
    pairs = int(causal_pairs(call.q_start, call.kv_length, call.row_starts()).sum()) * call.q.shape[1]
    ms, memory = measured(lambda: dense.attend(call, kernel), call)
    return Row(
        kind="dense",
        label=f"{kernel}, dense",
        kernel=kernel,
        config=None,
        length=call.kv_length,
        density=1.0,
        ms=ms,
        tflops_effective=_tflops(call, pairs, ms),
        selection_ms=None,
        total_ms=ms,
        peak_memory_mb=memory,
    )


def _blocks_row(call: AttentionCall, label: str, backend: str, density: float) -> Row:
    plan = random_plan(call, density)
    ms, memory = measured(lambda: block_sparse.attend(call, plan, backend), call)
    return Row(
        kind="blocks",
        label=label,
        kernel=backend,
        config=None,
        length=call.kv_length,
        density=plan.density().mean().item(),
        ms=ms,
        tflops_effective=_tflops(call, int(plan.computed_pairs().sum()), ms),
        selection_ms=None,
        total_ms=ms,
        peak_memory_mb=memory,
    )


def _method_row(call: AttentionCall, name: str, config: BoundConfig) -> Row:
    method = config.prefill
    assert method is not None, "checked by methods_of"
    plan = method.plan(call)
    if isinstance(plan, Dense):
        raise UnsupportedCallError(f"dense, {plan.reason}")
    op: Any = OPS[type(plan)]
    backend: str = op.fastest(call, plan) if config.settings.backend == "auto" else config.settings.backend
    ms, _ = measured(lambda: op.attend(call, plan, backend), call)
    selection_ms, _ = measured(lambda: method.plan(call), call)
    total_ms, memory = measured(lambda: op.attend(call, method.plan(call), backend), call)
    return Row(
        kind="method",
        label=f"{name} ({backend})",
        kernel=backend,
        config=name,
        length=call.kv_length,
        density=plan.density().mean().item(),
        ms=ms,
        tflops_effective=_tflops(call, int(plan.computed_pairs().sum()), ms),
        selection_ms=selection_ms,
        total_ms=total_ms,
        peak_memory_mb=memory,
    )


def _with_speedups(rows: Sequence[Row]) -> list[Row]:
    """The rows of one length, with their speed-ups over the dense rows."""
    dense_ms = {row.kernel: row.total_ms for row in rows if row.kind == "dense"}
    best, flash2 = min(dense_ms.values(), default=None), dense_ms.get(_FLASH2)
    return [
        replace(
            row,
            speedup=None if best is None else best / row.total_ms,
            speedup_flash2=None if flash2 is None else flash2 / row.total_ms,
        )
        for row in rows
    ]


def _tflops(call: AttentionCall, pairs: int, ms: float) -> float:
    return 4 * call.q.shape[-1] * pairs / ms / 1e9
