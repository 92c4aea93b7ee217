"""Helpers shared by the benchmarks: shapes, dtypes, clocks and the description of the machine."""

import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import torch
from rich import box
from rich.table import Table

from sparse_patch.bench.qkv import Shape
from sparse_patch.call import AttentionCall
from sparse_patch.config import BoundConfig, PatchConfig, load_config
from sparse_patch.errors import TaskError, UnsupportedCallError, nearest
from sparse_patch.integration.reporting import versions
from sparse_patch.model_shape import ModelShape
from sparse_patch.workbench.machine import machine
from sparse_patch.workbench.progress import Step

T = TypeVar("T")
RowT = TypeVar("RowT", bound="_AnyRow")
Columns: TypeAlias = Mapping[str, Callable[[RowT], str]]

SHAPES = {  # query heads, KV heads, head_dim
    "llama-3.1-8b": Shape(32, 8, 128),
    "qwen2.5-7b": Shape(28, 4, 128),
    "gemma3-12b": Shape(16, 8, 256),
    "minicpm4-8b": Shape(32, 2, 128),
    "needle-llama": Shape(8, 2, 64),
}


class _AnyRow(Protocol):
    """The field that every row has."""

    @property
    def length(self) -> int: ...


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model whose decode is timed.

    Attributes:
        model_type: Transformers' name of the architecture.
        layers: number of decoder layers, all with full attention.
        hidden: width of the residual stream.
        intermediate: width of the MLP.
        vocabulary: number of tokens.
        heads: heads of an attention layer.
        rope_theta: base of the rotary embedding.
    """

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: Shape
    rope_theta: float

    @property
    def model_shape(self) -> ModelShape:
        """The model shape that methods resolve their settings with."""
        return ModelShape(self.model_type, self.layers, self.heads.heads, self.heads.kv_heads, self.hidden)


ARCHITECTURES = {
    "llama-3.1-8b": Architecture("llama", 32, 4096, 14336, 128256, SHAPES["llama-3.1-8b"], 5e5),
    "qwen2.5-7b": Architecture("qwen2", 28, 3584, 18944, 152064, SHAPES["qwen2.5-7b"], 1e6),
    "qwen3-8b": Architecture("qwen3", 36, 4096, 12288, 151936, SHAPES["llama-3.1-8b"], 1e6),
    "needle-llama": Architecture("llama", 8, 384, 1024, 4096, SHAPES["needle-llama"], 1e6),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_CPU_SECONDS, _CPU_RUNS = 0.5, (3, 20)  # per row: seconds to measure, and (least, most) runs


def shape_of(text: str) -> Shape:
    """Return a known shape by its name, or parse `Hq,Hkv,D`; raise TaskError for anything else."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        heads, kv_heads, head_dim = (int(number) for number in text.split(","))
        if min(heads, kv_heads, head_dim) > 0 and max(heads, head_dim) < 2**20 and heads % kv_heads == 0:
            return Shape(heads, kv_heads, head_dim)
    except ValueError:
        pass
    raise TaskError(
        f"--shape: expected {', '.join(SHAPES)}, or query heads, KV heads and head_dim such as 32,8,128, got {text!r}"
        f"{nearest(text, SHAPES)}"
    )


def architecture_of(name: str, layers: int | None = None) -> Architecture:
    """Return a known architecture, with `layers` layers if given; raise TaskError for an unknown name."""
    if name not in ARCHITECTURES:
        raise TaskError(f"--shape: expected {', '.join(ARCHITECTURES)}, got {name!r}{nearest(name, ARCHITECTURES)}")
    found = ARCHITECTURES[name]
    return found if layers is None else replace(found, layers=layers)


def dtype_of(name: str) -> torch.dtype:
    """Return a dtype by its name; raise TaskError for one that is not timed."""
    if name not in DTYPES:
        raise TaskError(f"--dtype: expected {', '.join(DTYPES)}, got {name!r}{nearest(name, DTYPES)}")
    return DTYPES[name]


def default_dtype(device: str) -> str:
    """The dtype to time on a device by default."""
    return "bfloat16" if device == "cuda" else "float32"


@dataclass(frozen=True)
class Result(Generic[RowT]):
    """Rows ordered by length, and the lengths at which something did not run: `{"flash4: needs ...": [8192]}`."""

    rows: list[RowT]
    skipped: dict[str, list[int]]


def configs_by_stem(
    sources: Sequence[str], wanted: str, is_wanted: Callable[[PatchConfig], bool]
) -> dict[str, PatchConfig]:
    """Load configurations, keyed by the stems of their files.

    Args:
        sources: files or packaged names.
        wanted: what each configuration must have, for messages: "sparse decode method".
        is_wanted: tells whether a configuration has it.

    Raises:
        ConfigError: a configuration is not valid.
        TaskError: a configuration lacks what is wanted, or two have the same stem.
    """
    configs: dict[str, PatchConfig] = {}
    for source in sources:
        name, config = Path(source).stem, load_config(source)
        if name in configs:
            raise TaskError(f"--config: {source}: there is another configuration called {name!r}; rename the file")
        configs[name] = config
    for source, config in zip(sources, configs.values(), strict=True):
        if not is_wanted(config):
            raise TaskError(f"--config: {source}: has no {wanted} to time")
    return configs


def result_as_json(
    result: Result[Any], methods: Mapping[str, PatchConfig], dtype: torch.dtype, about: dict[str, Any]
) -> dict[str, Any]:
    """The result as JSON: what was measured, on which machine, and with which configurations.

    Args:
        result: the benchmark's result; its rows are dataclasses.
        methods: configurations by name.
        dtype: dtype of the timed inputs.
        about: everything else that the figures depend on.
    """
    return {
        "machine": {**describe_machine(), "dtype": str(dtype).removeprefix("torch.")},
        **about,
        "configs": {name: config.settings() for name, config in methods.items()},
        "skipped": result.skipped,
        "rows": [asdict(row) for row in result.rows],
    }


def settings_of(methods: Mapping[str, BoundConfig]) -> dict[str, PatchConfig]:
    """The settings of configurations on a model, by name."""
    return {name: config.settings for name, config in methods.items()}


def table_of(
    title: str,
    rows: Sequence[RowT],
    columns: Columns[RowT],
    about: str,
    section: Callable[[RowT], object] = lambda row: row.length,
) -> Table:
    """A table with one line per row.

    Args:
        title: text above the table.
        rows: in the order of the table.
        columns: column heading -> function that gives a row's cell. The first column is left-aligned and never wraps.
        about: text below the table.
        section: a line is drawn between rows that differ in this value.
    """
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE, caption=about)
    drawn.caption_justify = "left"
    first, *others = columns
    drawn.add_column(first, no_wrap=True)
    for column in others:
        drawn.add_column(column, justify="right")
    for number, row in enumerate(rows, 1):
        ends = number < len(rows) and section(rows[number]) != section(row)
        drawn.add_row(*(text(row) for text in columns.values()), end_section=ends)
    return drawn


def describe_machine() -> dict[str, Any]:
    """Describe what a kernel's time depends on. Packages that are not installed are left out."""
    packages = ("triton", "flash-attn-4", "flash-attn", "flashinfer-python")
    found = {name: _version(name) for name in packages}
    if torch.cuda.is_available():
        found |= {"driver": _driver(), "cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return {**machine(), **versions(), "system": platform.system(), **{k: v for k, v in found.items() if v is not None}}


def rows_of(
    ways: Iterable[tuple[str, Callable[[], T]]], length: int, skipped: dict[str, list[int]], progress: Step
) -> list[T]:
    """Measure the rows of one length. Unsupported or out-of-memory measurements are added to `skipped`.

    Args:
        ways: label and measurement of each row.
        length: tokens.
        skipped: what did not run and why -> its lengths; filled here.
        progress: called with a description before each measurement.
    """
    rows = []
    for label, measure in ways:
        progress(f"{label}, {length} tokens")
        try:
            rows.append(measure())
        except UnsupportedCallError as error:
            skipped.setdefault(f"{label}: {error}", []).append(length)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            skipped.setdefault(f"{label}: out of memory", []).append(length)
    return rows


def skipped_notes(skipped: dict[str, list[int]]) -> list[str]:
    """One line for each thing that did not run."""
    return [f"skipped at {', '.join(map(str, lengths))}: {what}" for what, lengths in skipped.items()]


def measured(function: Callable[[], object], call: AttentionCall) -> tuple[float, float | None]:
    """Median milliseconds of one run, and the most MB that it allocates (None on a CPU)."""
    if not call.q.is_cuda:
        return clocked(function), None
    from triton.testing import do_bench

    ms = float(do_bench(function, warmup=50, rep=300, return_mode="median"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return ms, (torch.cuda.max_memory_allocated() - before) / 2**20


def clocked(function: Callable[[], object]) -> float:
    """Median milliseconds of one run by the wall clock, after a warm-up. Used on a CPU."""
    function()
    seconds: list[float] = []
    least, most = _CPU_RUNS
    while len(seconds) < least or (len(seconds) < most and sum(seconds) < _CPU_SECONDS):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return 1000 * median(seconds)


def cell(value: float | None, digits: int) -> str:
    """A number as text for a table; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The version of NVIDIA's driver, or None if Linux does not report it."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", path.read_text()) if path.is_file() else None
    return found[0] if found else None
