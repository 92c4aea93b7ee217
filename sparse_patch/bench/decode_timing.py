"""Timing of a decode step of all layers, and the bytes that it must move."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sparse_patch.bench.common import clocked
from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention import page_decode
from sparse_patch.plans import PagePlan

OURS = "page_decode"
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}


@dataclass(frozen=True)
class Row:
    """The time of one kernel or method for decode attention of one layer or of all layers.

    Attributes:
        kind: "dense", "lists" (random lists), "select" (dense with page scores and top pages), "layer" (one layer of
            a configuration), or "stack" (all layers).
        label: the row's name in tables.
        kernel: the dense kernel, or page_decode's backend.
        config: name of the configuration; None if the row has none.
        length: valid keys of each batch row.
        layers: number of layers that the figures cover: 1, or all layers for a stack.
        ms: time of a step.
        mb: bytes that the step must move, in MB (1e6 bytes).
        floor_ms: time to move them at copy bandwidth.
        floors: `ms` divided by `floor_ms`.
        dense: `ms` divided by the time of our dense decode for the same number of layers, on the same keys.
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
class Layers:
    """The decode calls of all layers at one length; times a step of them."""

    calls: list[AttentionCall]
    length: int
    gb_per_s: float

    def time(self, step: Callable[[], object]) -> float:
        """Return the milliseconds of a step of all layers."""
        return replayed(step) if self.calls[0].q.is_cuda else clocked(step)

    def row(self, kind: Any, label: str, step: Callable[[], object], size: float, **about: Any) -> Row:
        """Time a step of all layers that moves `size` bytes per layer. A row covers one layer unless it is a stack."""
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

    def forget(self) -> None:
        """Clear the state that methods keep in addition to the caches."""
        for call in self.calls:
            assert call.kv_state is not None, "made by Benchmark.calls"
            call.kv_state.clear()


def bytes_of(call: AttentionCall, plan: PagePlan) -> float:
    """The bytes that a call must move: keys and values that its plan reads, statistics, and logits written and read.

    If each query head has its own list, the keys count once per query head, else once per KV head.
    """
    pairs = plan.computed_pairs()
    own_lists = plan.pages is not None and plan.pages.shape[1] == plan.heads
    read = pairs if own_lists else pairs[:, :: call.group_size]
    size = float(read.sum()) * (call.k.shape[-1] + call.v.shape[-1]) * call.k.element_size()
    if plan.wants_logits:
        size += 2 * 4 * float(pairs.sum())
    if call.kv_state is not None:
        size += call.kv_state.num_bytes
    return size


def copy_bandwidth(device: str) -> float:
    """GB/s of a large copy by a kernel, reads and writes counted; `copy_` in a graph uses the slower copy engine."""
    size = _COPY_BYTES[device]
    source = torch.zeros(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        torch.neg(source, out=target)

    ms = replayed(copy) if device == "cuda" else clocked(copy)
    return 2 * size / ms / 1e6


def replayed(step: Callable[[], object]) -> float:
    """Median milliseconds of a step that is captured in a CUDA graph and replayed."""
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
