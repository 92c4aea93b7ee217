"""`sparse-patch bench decode`: attention of one decode step, per kind of layer and for all layers of a model.

Every layer has its own queries and its own static cache, as in a model, so no layer finds its keys in the GPU's cache.
On a GPU one step of all layers is one CUDA graph, timed by replaying it (medians). The time of a layer is the time of
the graph divided by the number of layers. On a CPU the wall clock times plain calls. The rows are:

- dense: our `page_decode` on every key, PyTorch's SDPA, and flash-attn and flashinfer if they are installed and
  support the call;
- lists: `page_decode` on random lists of each budget: one list for all heads, one per KV head, one per query head;
- select: a selecting layer, which runs dense attention with logits, page scores and top pages;
- layer and stack, for each configuration: one layer of each role, and all layers, run through the method as the hook
  runs it (remember, plan, attend, select). Layers that the method leaves dense run our dense decode;
- stack only, for a configuration of spans: it runs on full rings, because each layer has its own spans.

A row's floor is the time to move the bytes it must read or write, at copy bandwidth. These bytes are the keys and
values that the step reads, the statistics, and the logits (written and read). Copy bandwidth is measured in the same
run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.table import Table

from sparse_patch.bench import common, decode_kernels
from sparse_patch.bench.common import (
    Architecture,
    Columns,
    cell,
    configs_by_stem,
    result_as_json,
    rows_of,
    settings_of,
    skipped_notes,
    table_of,
)
from sparse_patch.bench.decode_rows import (
    all_layers,
    all_layers_of_spans,
    one_layer,
    other_kernel,
    ours,
    random_lists_row,
    selecting_layer,
)
from sparse_patch.bench.decode_step import method_of
from sparse_patch.bench.decode_timing import OURS, Layers, Row, copy_bandwidth
from sparse_patch.call import AttentionCall, KVState
from sparse_patch.config import BoundConfig
from sparse_patch.kernels.room import SPARE
from sparse_patch.workbench.machine import machine
from sparse_patch.workbench.progress import Step

_PAGES = (16, 1)  # page sizes of the random lists, in tokens
_KINDS = ("dense", "lists", "select", "layer", "stack")


@dataclass(frozen=True)
class Benchmark:
    """What to time.

    Attributes:
        architecture: sizes and number of layers.
        lengths: numbers of valid keys.
        batch: number of rows.
        budgets: sizes of the random lists, in tokens.
        methods: name -> configuration resolved for the architecture; its decode method is timed.
        dtype: dtype of queries, keys and values.
        device: "cuda" or "cpu".
    """

    architecture: Architecture
    lengths: Sequence[int]
    batch: int
    budgets: Sequence[int]
    methods: dict[str, BoundConfig]
    dtype: torch.dtype
    device: str

    @property
    def steps(self) -> int:
        """Number of measurements if nothing is skipped."""
        each = 2 + len(decode_kernels.KERNELS) + len(self.budgets) * 3 * len(_PAGES)
        return len(self.lengths) * (each + sum(1 + len(roles_of(self, name)) for name in self.methods))

    def calls(self, length: int) -> list[AttentionCall]:
        """The decode call of every layer: random queries, and a static cache of random keys and values."""
        shape, generator = self.architecture.heads, torch.Generator(self.device).manual_seed(0)

        def rand(heads: int, tokens: int) -> torch.Tensor:
            size = (self.batch, heads, tokens, shape.head_dim)
            return torch.randn(size, generator=generator, dtype=self.dtype, device=self.device)

        return [
            AttentionCall(
                q=rand(shape.heads, 1),
                k=rand(shape.kv_heads, length + SPARE),
                v=rand(shape.kv_heads, length + SPARE),
                scale=shape.head_dim**-0.5,
                layer=layer,
                phase="decode",
                kv_end=torch.tensor(length, device=self.device),
                kv_state=KVState(),
            )
            for layer in range(self.architecture.layers)
        ]


@dataclass(frozen=True)
class Result(common.Result[Row]):
    """Rows ordered by length, what did not run, and the copy bandwidth."""

    gb_per_s: float


def ways(layers: Layers, benchmark: Benchmark) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Yield the label and the measurement of every row."""
    yield OURS, partial(ours, layers)
    for kernel in decode_kernels.KERNELS:
        yield kernel, partial(other_kernel, layers, kernel)
    for budget in benchmark.budgets:
        for lists, heads in lists_of(benchmark.architecture).items():
            for page in _PAGES:
                label = f"{budget} tokens, {lists}, pages of {page}"
                yield label, partial(random_lists_row, layers, label, budget, heads, page)
    yield "selecting layer", partial(selecting_layer, layers, max(benchmark.budgets), _PAGES[0])
    for name, config in benchmark.methods.items():
        for role, layer in roles_of(benchmark, name).items():
            yield f"{name}: {role}", partial(one_layer, layers, name, config, role, layer)
        stack = all_layers_of_spans if method_of(config).retention else all_layers
        yield f"{name}: stack", partial(stack, layers, name, config)


def methods_of(sources: Sequence[str], architecture: Architecture) -> dict[str, BoundConfig]:
    """Load configurations with a sparse decode method and resolve them for an architecture; keyed by file stem.

    Raises:
        ConfigError: a configuration is not valid, or does not fit the architecture.
        TaskError: a configuration has no decode method to time, or two have the same stem.
    """
    configs = configs_by_stem(
        sources, "sparse decode method", lambda config: config.decode is not None and config.decode.method != "dense"
    )
    return {name: config.bind(architecture.model_shape) for name, config in configs.items()}


def lists_of(architecture: Architecture) -> dict[str, int]:
    """The ways in which heads can share lists, each with its number of lists."""
    heads = architecture.heads
    return {"one list": 1, "lists per KV head": heads.kv_heads, "lists per query head": heads.heads}


def roles_of(benchmark: Benchmark, name: str) -> dict[str, int]:
    """The roles of a configuration's sparse and selecting layers, each with one layer of that role."""
    config = benchmark.methods[name]
    method, found = method_of(config), dict[str, int]()
    if method.retention:
        return {}
    for layer in sorted(config.settings.layers("decode", benchmark.architecture.layers)):
        found[method.role(layer) or "layer"] = layer
    return {role: layer for role, layer in found.items() if role != "full"}


@torch.no_grad()
def bench_decode(benchmark: Benchmark, progress: Step = lambda _: None) -> Result:
    """Time every kernel and method at every length; calls that one of them does not support are skipped and noted.

    Args:
        benchmark: what to time.
        progress: called with a description before each row.
    """
    result = Result([], {}, copy_bandwidth(benchmark.device))
    for length in benchmark.lengths:
        try:
            layers = Layers(benchmark.calls(length), length, result.gb_per_s)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            result.skipped.setdefault("caches of all layers: out of memory, ask for fewer --layers", []).append(length)
            continue
        result.rows.extend(_against_dense(rows_of(ways(layers, benchmark), length, result.skipped, progress)))
        del layers
        if benchmark.device == "cuda":
            torch.cuda.empty_cache()
    return result


def as_json(result: Result, benchmark: Benchmark) -> dict[str, Any]:
    """The result as JSON: what was measured, on which machine, and with which configurations."""
    about = {
        "shape": asdict(benchmark.architecture),
        "batch": benchmark.batch,
        "qkv": "random Q/K/V",
        "timing": "CUDA graph of one step of all layers" if benchmark.device == "cuda" else "plain calls",
        "copy_gb_per_s": round(result.gb_per_s, 1),
    }
    return result_as_json(result, settings_of(benchmark.methods), benchmark.dtype, about)


def table(result: Result, benchmark: Benchmark) -> Table:
    """A table with one line per row and one section per kind and length."""
    architecture = benchmark.architecture
    about = (
        f"{machine()['device']}, {benchmark.dtype}, heads and head_dim {architecture.heads}, {architecture.layers} "
        f"layers, batch {benchmark.batch}; a copy moves {result.gb_per_s:.0f} GB/s"
    )
    columns: Columns[Row] = {
        "layer": lambda row: row.label,
        "tokens": lambda row: str(row.length),
        "us": lambda row: f"{1000 * row.ms:.1f}",
        "MB": lambda row: f"{row.mb:.1f}",
        "floor us": lambda row: f"{1000 * row.floor_ms:.1f}",
        "x floor": lambda row: f"{row.floors:.2f}",
        "x dense": lambda row: cell(row.dense, 3),
    }
    return table_of(
        "decode attention of one token", result.rows, columns, about, section=lambda row: (row.kind, row.length)
    )


def notes(result: Result) -> list[str]:
    """One line for each thing that did not run."""
    return skipped_notes(result.skipped)


def _against_dense(rows: Sequence[Row]) -> list[Row]:
    """The rows of one length, ordered by kind, with `dense` set: time relative to our dense decode."""
    ours = next((row.ms for row in rows if row.label.startswith(OURS)), None)
    ordered = sorted(rows, key=lambda row: _KINDS.index(row.kind))
    return [replace(row, dense=None if ours is None else row.ms / ours / row.layers) for row in ordered]
