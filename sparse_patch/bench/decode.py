"""`sparse-patch bench decode`: one decode step's attention, per kind of layer and for all layers of a model.

Every layer has its own queries and its own static cache, as in a model, so that no layer finds its keys in the GPU's
cache. One step of all layers is one CUDA graph, timed by replaying it (medians); the time of a layer is that of the
graph by its layers. On a CPU the clock times plain calls. What is timed:

- dense: our `page_decode` on every key, PyTorch's SDPA, flash-attn and flashinfer where they are installed and serve;
- lists: `page_decode` on random lists of a budget, one for all heads, per KV head and per query head, and a selecting
  layer: dense with logits, page scores, top pages;
- for each configuration a layer of each role, and the whole stack, through the method as the hook runs it: remember,
  plan, attend, select. Layers that the method leaves dense run our dense decode;
- for a configuration of spans the whole stack alone, on full rings: each layer has spans of its own.

The floor of a row is the time to move the bytes that it cannot do without (keys and values that are read, statistics,
logits written and read) at the bandwidth of a copy, measured in the same run.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from rich import box
from rich.table import Table
from transformers import Cache

from sparse_patch.attention import attend_pages
from sparse_patch.bench import decode_kernels
from sparse_patch.bench.common import (
    Architecture,
    cell,
    clocked,
    configs_by_stem,
    describe_machine,
    rows_of,
    skipped_notes,
)
from sparse_patch.caches import cache_bytes
from sparse_patch.call import AttentionCall
from sparse_patch.config import PatchConfig
from sparse_patch.errors import TaskError, UnsupportedCallError, reason
from sparse_patch.evaluation.generation import machine
from sparse_patch.memory import LayerMemory
from sparse_patch.methods.base import DecodeMethod
from sparse_patch.methods.spans import SpanMethod
from sparse_patch.ops import page_decode
from sparse_patch.ops.page_scores import page_scores
from sparse_patch.ops.top_pages import top_pages
from sparse_patch.plans import Dense, PagePlan
from sparse_patch.progress import Step
from sparse_patch.rings import FixedRingLayer

OURS = "page_decode"
_SPARE = 256  # tokens of room behind the valid ones, as a static cache has while it generates
_PAGES = (16, 1)  # tokens of a page of the random lists
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
_KINDS = ("dense", "lists", "select", "layer", "stack")


@dataclass(frozen=True)
class Row:
    """One way of running decode attention, of a layer or of all layers.

    Attributes:
        kind: "dense", "lists" (random ones), "select" (dense with scores and top pages), "layer" (one of a
            configuration), or "stack" (all layers).
        label: for tables.
        kernel: the dense kernel, or page_decode's backend.
        config: name of the configuration; None without one.
        length: valid keys of each row.
        layers: how many layers the figures are of: 1, or all of a stack.
        ms: time of a step.
        mb: what has to be moved, in MB (1e6 bytes).
        floor_ms: time to move it at the bandwidth of a copy.
        floors: `ms` by `floor_ms`.
        dense: `ms` by the time of as many layers of our dense decode, on the same keys.
    """

    kind: Literal["dense", "lists", "select", "layer", "stack"]
    label: str
    kernel: str
    config: str | None
    length: int
    layers: int
    ms: float
    mb: float
    floor_ms: float
    floors: float
    dense: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """What to time.

    Attributes:
        architecture: sizes and number of layers.
        lengths: valid keys.
        batch: rows.
        budgets: tokens of the random lists.
        methods: configurations resolved for the architecture, by name; their decode methods are timed.
        dtype: of queries, keys and values.
        device: "cuda" or "cpu".
    """

    architecture: Architecture
    lengths: Sequence[int]
    batch: int
    budgets: Sequence[int]
    methods: dict[str, PatchConfig]
    dtype: torch.dtype
    device: str

    @property
    def steps(self) -> int:
        """Measurements, if nothing is skipped."""
        each = 2 + len(decode_kernels.KERNELS) + len(self.budgets) * 3 * len(_PAGES)
        return len(self.lengths) * (each + sum(1 + len(roles_of(self, name)) for name in self.methods))

    def calls(self, length: int) -> list[AttentionCall]:
        """The decode call of every layer: random queries, a static cache with random keys and values."""
        shape, generator = self.architecture.heads, torch.Generator(self.device).manual_seed(0)

        def rand(heads: int, tokens: int) -> torch.Tensor:
            size = (self.batch, heads, tokens, shape.head_dim)
            return torch.randn(size, generator=generator, dtype=self.dtype, device=self.device)

        return [
            AttentionCall(
                q=rand(shape.heads, 1),
                k=rand(shape.kv_heads, length + _SPARE),
                v=rand(shape.kv_heads, length + _SPARE),
                scale=shape.head_dim**-0.5,
                layer=layer,
                phase="decode",
                kv_end=torch.tensor(length, device=self.device),
                memory=LayerMemory(),
            )
            for layer in range(self.architecture.layers)
        ]


@dataclass(frozen=True)
class Result:
    """Rows by length, the bandwidth of a copy, and what did not run: `{"cudnn: needs ...": [8192]}`."""

    rows: list[Row]
    gb_per_s: float
    skipped: dict[str, list[int]]


@dataclass(frozen=True)
class _Bench:
    """The layers of one length, and how a step of them is timed."""

    calls: list[AttentionCall]
    length: int
    gb_per_s: float

    def time(self, step: Callable[[], object]) -> float:
        """Milliseconds of a step of all layers."""
        return replayed(step) if self.calls[0].q.is_cuda else clocked(step)

    def row(self, kind: Any, label: str, step: Callable[[], object], size: float, **about: Any) -> Row:
        """A row of a step of all layers, that moves `size` bytes in each; of one layer but for a stack."""
        layers = len(self.calls) if kind == "stack" else 1
        ms = self.time(step) * layers / len(self.calls)
        floor = layers * size / self.gb_per_s / 1e6
        return Row(
            kind=kind,
            label=label,
            kernel=about.get("kernel", self.backend),
            config=about.get("config"),
            length=self.length,
            layers=layers,
            ms=ms,
            mb=layers * size / 1e6,
            floor_ms=floor,
            floors=ms / floor,
        )

    @property
    def backend(self) -> str:
        return page_decode.fastest(self.calls[0], PagePlan.every(self.calls[0]))

    def ways(self, benchmark: Benchmark) -> Iterator[tuple[str, Callable[[], Row]]]:
        """Label and measurement of every row."""
        yield OURS, self.ours
        for kernel in decode_kernels.KERNELS:
            yield kernel, partial(self.other, kernel)
        for budget in benchmark.budgets:
            for lists, heads in lists_of(benchmark.architecture).items():
                for page in _PAGES:
                    label = f"{budget} tokens, {lists}, pages of {page}"
                    yield label, partial(self.random_lists, label, budget, heads, page)
        yield "selecting layer", partial(self.selecting, max(benchmark.budgets))
        for name, config in benchmark.methods.items():
            for role, layer in roles_of(benchmark, name).items():
                yield f"{name}: {role}", partial(self.layer, name, config, role, layer)
            stack = self.span_stack if isinstance(config.decode, SpanMethod) else self.stack
            yield f"{name}: stack", partial(stack, name, config)

    def ours(self) -> Row:
        def step() -> None:
            for call in self.calls:
                page_decode.attend(call, PagePlan.every(call))

        return self.row(
            "dense", f"{OURS} ({self.backend})", step, bytes_of(self.calls[0], PagePlan.every(self.calls[0]))
        )

    def other(self, kernel: str) -> Row:
        if problem := decode_kernels.unsupported(self.calls[0], kernel):
            raise UnsupportedCallError(problem)
        attends = [decode_kernels.prepared(call, self.length, kernel) for call in self.calls]
        try:
            attends[0]()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # not ours: it must not end the run
            raise UnsupportedCallError(reason(error)) from None

        def step() -> None:
            for attend in attends:
                attend()

        size = bytes_of(self.calls[0], PagePlan.every(self.calls[0]))
        return self.row("dense", kernel, step, size, kernel=kernel)

    def random_lists(self, label: str, budget: int, lists: int, page: int) -> Row:
        plans = [random_lists(call, self.length, budget, lists, page, seed) for seed, call in enumerate(self.calls)]

        def step() -> None:
            for call, plan in zip(self.calls, plans, strict=True):
                page_decode.attend(call, plan)

        return self.row("lists", label, step, bytes_of(self.calls[0], plans[0]))

    def selecting(self, budget: int) -> Row:
        page = _PAGES[0]

        def select(call: AttentionCall) -> None:
            _, lse, logits = page_decode.attend(call, PagePlan.every(call, page, wants_logits=True))
            assert lse is not None and logits is not None, "the plan wants them"
            lengths = call.lengths()
            scores = page_scores(logits, lse[..., -1], lengths, page)
            top_pages(scores[:, None], lengths, -(-budget // page), page)

        def step() -> None:
            for call in self.calls:
                select(call)

        plan = PagePlan.every(self.calls[0], page, wants_logits=True)
        return self.row("select", f"dense, logits, top {budget} tokens", step, bytes_of(self.calls[0], plan))

    def layer(self, name: str, config: PatchConfig, role: str, layer: int) -> Row:
        """A layer of one role, with the list that the selecting layer before it carries on."""
        self._forget()
        carried = carried_to(config, self.calls[0], layer)
        calls = [replace(call, layer=layer) for call in self.calls]
        own = replace(calls[0], carried=dict(carried))
        size = bytes_of(own, run_layer(config, own))

        def step() -> None:
            for call in calls:
                run_layer(config, replace(call, carried=dict(carried)))

        return self.row("layer", f"{name}: {role}", step, size, config=name)

    def stack(self, name: str, config: PatchConfig) -> Row:
        """All layers, each in its role."""
        self._forget()
        plans = run_stack(config, self.calls)
        size = sum(bytes_of(*pair) for pair in zip(self.calls, plans, strict=True)) / len(plans)
        return self.row(
            "stack", f"{name}: {len(plans)} layers", lambda: run_stack(config, self.calls), size, config=name
        )

    def span_stack(self, name: str, config: PatchConfig) -> Row:
        """All layers on what a static cache keeps for spans: full rings, and all keys where a layer has no ring."""
        used = config.layers("decode", len(self.calls))
        rings = [full_ring(config, call, self.length) if call.layer in used else None for call in self.calls]
        before = torch.full((len(self.calls[0].q),), self.length, device=self.calls[0].q.device)
        own = [replace(call, k=call.k[:, :, :1], v=call.v[:, :, :1], kv_end=None) for call in self.calls]

        def step() -> None:
            for ring, call, token in zip(rings, self.calls, own, strict=True):
                if ring is None:
                    page_decode.attend(call, PagePlan.every(call), config.backend)
                else:
                    ring.attend(token, before, config.backend)

        every = bytes_of(self.calls[0], PagePlan.every(self.calls[0]))
        kept = cache_bytes(Cache(layers=[ring for ring in rings if ring is not None])).allocated
        size = (kept + every * rings.count(None)) / len(rings)
        return self.row("stack", f"{name}: {len(rings)} layers", step, size, config=name)

    def _forget(self) -> None:
        for call in self.calls:
            assert call.memory is not None, "made by Benchmark.calls"
            call.memory.clear()


def methods_of(sources: Sequence[str], architecture: Architecture) -> dict[str, PatchConfig]:
    """Configurations with a sparse decode method, resolved for an architecture, by the stems of their files.

    Raises:
        ConfigError: a configuration is not valid, or does not fit the architecture.
        TaskError: it has no decode method to time, or two have the same stem.
    """
    configs = configs_by_stem(sources)
    for source, config in zip(sources, configs.values(), strict=True):
        if not isinstance(config.decode, DecodeMethod | SpanMethod):
            raise TaskError(f"--config: {source}: has no sparse decode method to time")
    return {name: config.for_model(architecture.model_shape) for name, config in configs.items()}


def lists_of(architecture: Architecture) -> dict[str, int]:
    """How heads may share lists, and how many lists that makes."""
    heads = architecture.heads
    return {"one list": 1, "lists per KV head": heads.kv_heads, "lists per query head": heads.heads}


def roles_of(benchmark: Benchmark, name: str) -> dict[str, int]:
    """The roles of the sparse and selecting layers of a configuration, with a layer that has each."""
    config = benchmark.methods[name]
    if isinstance(config.decode, SpanMethod):
        return {}
    method, found = method_of(config), dict[str, int]()
    for layer in sorted(config.layers("decode", benchmark.architecture.layers)):
        found[method.role(layer) or "layer"] = layer
    return {role: layer for role, layer in found.items() if role != "full"}


@torch.no_grad()
def bench_decode(benchmark: Benchmark, progress: Step = lambda _: None) -> Result:
    """Time every way of attending at every length; what a kernel or method does not serve is skipped and noted.

    Args:
        benchmark: what to time.
        progress: called with a description before each row.
    """
    result = Result([], copy_bandwidth(benchmark.device), {})
    for length in benchmark.lengths:
        try:
            bench = _Bench(benchmark.calls(length), length, result.gb_per_s)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            result.skipped.setdefault("caches of all layers: out of memory, ask for fewer --layers", []).append(length)
            continue
        result.rows.extend(_against_dense(rows_of(bench.ways(benchmark), length, result.skipped, progress)))
        del bench
        if benchmark.device == "cuda":
            torch.cuda.empty_cache()
    return result


def run_layer(config: PatchConfig, call: AttentionCall) -> PagePlan:
    """One decode call through a method as the hook runs it; what it read.

    Raises:
        UnsupportedCallError: the backend of the configuration cannot serve the call.
    """
    method = method_of(config)
    method.remember(call)
    plan = method.plan(call)
    if isinstance(plan, Dense):
        plan = PagePlan.every(call)
    assert isinstance(plan, PagePlan), "a decode method plans pages"
    attend_pages(call, plan, method, config.backend)
    return plan


def run_stack(config: PatchConfig, calls: Sequence[AttentionCall]) -> list[PagePlan]:
    """One step of all layers, as one forward runs them; what each read."""
    carried: dict[str, Any] = {}
    used = config.layers("decode", len(calls))
    plans = []
    for call in calls:
        if call.layer in used:
            plans.append(run_layer(config, replace(call, carried=carried)))
        else:
            plans.append(PagePlan.every(call))
            page_decode.attend(call, plans[-1], config.backend)
    return plans


def full_ring(config: PatchConfig, call: AttentionCall, length: int) -> FixedRingLayer:
    """The ring of a layer of a static cache that has seen so many tokens, with random keys and values."""
    method = config.decode
    assert isinstance(method, SpanMethod), "checked by ways"
    ring = FixedRingLayer(partial(method.spans, call.layer), length + _SPARE)
    ring.lazy_initialization(call.k, call.v)
    assert ring.keys is not None and ring.values is not None
    ring.keys.normal_(), ring.values.normal_()
    ring.seen.fill_(length)
    return ring


def carried_to(config: PatchConfig, call: AttentionCall, layer: int) -> dict[str, Any]:
    """What the layers before `layer` carry on to it: all of them run on one call's keys."""
    carried: dict[str, Any] = {}
    method = method_of(config)
    for before in sorted(config.layers("decode", layer + 1) - {layer}):
        if method.role(before) == "select":
            run_layer(config, replace(call, layer=before, carried=carried))
    return carried


def method_of(config: PatchConfig) -> DecodeMethod:
    """The decode method of a configuration that `methods_of` returned."""
    assert isinstance(config.decode, DecodeMethod), "checked by methods_of"
    return config.decode


def random_lists(call: AttentionCall, length: int, budget: int, lists: int, page_size: int, seed: int = 0) -> PagePlan:
    """Random pages, the last one among them, as many as the budget has; each list its own."""
    pages, wanted = -(-length // page_size), -(-budget // page_size)
    if wanted > pages:
        raise UnsupportedCallError(f"the budget is more than {length} tokens")
    generator = torch.Generator(call.q.device).manual_seed(seed)
    chance = torch.rand(call.q.shape[0], lists, pages, generator=generator, device=call.q.device)
    chance[..., -1] = 2.0
    chosen = chance.topk(wanted, -1).indices.sort(-1).values.int()
    return PagePlan.of(call, chosen, torch.full_like(chosen[..., 0], wanted), page_size)


def bytes_of(call: AttentionCall, plan: PagePlan) -> float:
    """What a call has to move: keys and values that its plan reads, statistics, logits written and read.

    Heads that have lists of their own read each for itself; the others of a KV head read together.
    """
    pairs = plan.computed_pairs()
    own_lists = plan.pages is not None and plan.pages.shape[1] == plan.heads
    read = pairs if own_lists else pairs[:, :: call.group_size]
    size = float(read.sum()) * (call.k.shape[-1] + call.v.shape[-1]) * call.k.element_size()
    if plan.wants_logits:
        size += 2 * 4 * float(pairs.sum())
    if call.memory is not None:
        size += sum(tensor.numel() * tensor.element_size() for tensor in call.memory.tensors.values())
    return size


def copy_bandwidth(device: str) -> float:
    """GB/s of a large copy, read and write counted; by a kernel, as `copy_` in a graph takes the slower copy engine."""
    size = _COPY_BYTES[device]
    source = torch.zeros(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        torch.neg(source, out=target)

    ms = replayed(copy) if device == "cuda" else clocked(copy)
    return 2 * size / ms / 1e6


def replayed(step: Callable[[], object]) -> float:
    """Milliseconds of a step that is captured in a CUDA graph and replayed, median."""
    from triton.testing import do_bench

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return float(do_bench(graph.replay, warmup=50, rep=300, return_mode="median"))


def as_json(result: Result, benchmark: Benchmark) -> dict[str, Any]:
    """What was measured, on what, and of what."""
    return {
        "machine": {**describe_machine(), "dtype": str(benchmark.dtype).removeprefix("torch.")},
        "shape": asdict(benchmark.architecture),
        "batch": benchmark.batch,
        "qkv": "random Q/K/V",
        "timing": "CUDA graph of one step of all layers" if benchmark.device == "cuda" else "plain calls",
        "copy_gb_per_s": round(result.gb_per_s, 1),
        "configs": {name: config.settings() for name, config in benchmark.methods.items()},
        "skipped": result.skipped,
        "rows": [asdict(row) for row in result.rows],
    }


def table(result: Result, benchmark: Benchmark) -> Table:
    """One line a row; a section for each kind and length."""
    architecture = benchmark.architecture
    about = (
        f"{machine()['device']}, {benchmark.dtype}, heads and head_dim {architecture.heads}, {architecture.layers} "
        f"layers, batch {benchmark.batch}; a copy moves {result.gb_per_s:.0f} GB/s"
    )
    drawn = Table(title="decode attention of one token", title_justify="left", box=box.SIMPLE, caption=about)
    drawn.caption_justify = "left"
    drawn.add_column("layer", no_wrap=True)
    for column in ("tokens", "us", "MB", "floor us", "x floor", "x dense"):
        drawn.add_column(column, justify="right")
    for number, row in enumerate(result.rows, 1):
        after = result.rows[number] if number < len(result.rows) else None
        drawn.add_row(
            row.label,
            str(row.length),
            f"{1000 * row.ms:.1f}",
            f"{row.mb:.1f}",
            f"{1000 * row.floor_ms:.1f}",
            f"{row.floors:.2f}",
            cell(row.dense, 3),
            end_section=after is not None and (after.kind, after.length) != (row.kind, row.length),
        )
    return drawn


def notes(result: Result) -> list[str]:
    """What did not run."""
    return skipped_notes(result.skipped)


def _against_dense(rows: Sequence[Row]) -> list[Row]:
    """The rows of one length in the order of their kinds, each against our dense decode of as many layers."""
    ours = next((row.ms for row in rows if row.label.startswith(OURS)), None)
    ordered = sorted(rows, key=lambda row: _KINDS.index(row.kind))
    return [replace(row, dense=None if ours is None else row.ms / ours / row.layers) for row in ordered]
