"""How a decode step of all layers is timed, and what it has to move."""

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
class Layers:
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

    def forget(self) -> None:
        """Clear what methods keep beside the caches."""
        for call in self.calls:
            assert call.kv_state is not None, "made by Benchmark.calls"
            call.kv_state.clear()


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
    if call.kv_state is not None:
        size += call.kv_state.num_bytes
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
