"""One run of `generate`, with the time of each token and the memory of both phases."""

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from transformers import Cache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from sparse_patch.integration.caches.size import CacheBytes, cache_bytes
from sparse_patch.report import SparsityReport
from sparse_patch.workbench.machine import synchronize


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

    @property
    def steps_ms(self) -> list[float]:
        """Milliseconds of each token after the first."""
        return [1000 * (after - before) for before, after in pairwise(self.times)]


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


def generate(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, typed: dict[str, Any]) -> Generation:
    """Generate greedily, and time each token.

    Args:
        model: patched or not.
        prompt: int64 `[batch, length]`.
        new_tokens: tokens to generate.
        typed: further arguments of `generate`.
    """
    on_gpu = prompt.is_cuda
    clock, generating = _Clock(on_gpu), cast(Any, model)  # PreTrainedModel's type has no `generate`
    synchronize()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    answer = generating.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        return_dict_in_generate=True,
        **typed,
    )
    peaks = None if clock.first_peak is None else (clock.first_peak, torch.cuda.max_memory_allocated())
    kept = cast(Cache, answer.past_key_values)
    return Generation([at - begin for at in clock.times[1:]], peaks, cache_bytes(kept))


def capture_seconds(report: SparsityReport) -> float | None:
    """Seconds that the capture of the decode step's graph took; None without a capture, as on a CPU."""
    return report.graphs.capture_s if report.graphs.captures else None
