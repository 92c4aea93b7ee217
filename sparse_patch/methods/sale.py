"""SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling (2025).

For every tile of 64 queries of every head, a block of 32 keys is read if some query of the tile gives some key of the
block an attention above `tau`, relative to its attention to the sink and to the keys near it. Attention to the sink and
to the near keys is exact. Attention to the others is estimated from quantised queries and keys. arXiv 2505.24179; code:
BirdChristopher/SALE. The algorithm in plain PyTorch: `ops/selection/low_bit_scores/torch.py`.

The thresholds belong to a model. The paper finds one for each head, offline, so that the head's output stays within an
error. Without a calibration one threshold serves all heads. The paper does not do this, and the report says so.

This implementation differs from the public code in the following:

- It estimates in 8 bits unless asked for 4. Hopper multiplies no 4-bit integers, and 8 bits are closer to the truth.
  Thresholds found with one do not hold for the other, so a calibration names its numerics.
- Attention is computed in tiles of `block_size`, in the model's precision. A tile that holds a kept block is read
  whole, so more is read than was decided. The code gathers blocks of 32, or multiplies in 8 bits.
- `window` is respected. The code ignores the argument: it uses 128 to make a map of blocks, and 256 to calibrate.
- KV heads are not repeated, and are quantised once.
- Served are any batch size, left padding (each row counts from its first real token), chunked prefill and the model's
  own scale and softcap. A chunk that begins on a tile's edge decides as the whole prompt would, except for the mean of
  the keys, which covers the keys up to the chunk's end.

A query tile looks at no score of a later key. Only the mean that is subtracted from all keys depends on later ones.
"""

from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from sparse_patch.artefacts.base import check_shape, place_of
from sparse_patch.artefacts.thresholds import MAKE_ONE, Thresholds, read_thresholds
from sparse_patch.call import AttentionCall
from sparse_patch.errors import FieldError, one_line
from sparse_patch.files.reading import MOST
from sparse_patch.methods.base.bound import BoundMethod, BoundPrefill, Selection
from sparse_patch.methods.base.settings import PrefillMethod
from sparse_patch.model_shape import ModelShape
from sparse_patch.ops.selection.low_bit_scores import (
    DENSE_BELOW,
    LowBitParams,
    Numerics,
    decided_pairs,
    decisions,
    tiles,
)
from sparse_patch.plans import BlockGrid, BlockPlan, Dense, Plan


class Sale(PrefillMethod):
    """Blocks by their attention relative to sink and window, estimated in few bits.

    Attributes:
        numerics: "int8", or "int4" as published (for comparisons; it is slower).
        tau: a block is read if the relative attention to one of its keys is above this; the same for every head. Below
            1e-5 everything is read. Not used with a calibration.
        calibration: safetensors file with a threshold for each head, written by `sparse-patch calibrate sale`. A
            relative path counts from the folder of the YAML file that names it. None for `tau` everywhere.
        window: keys before the end of a query tile that are always read, in tokens; a multiple of 32.
        block_size: side in tokens of the computed tiles; every tile that holds a kept block is computed.
    """

    summary = "blocks by relative attention, estimated in few bits"
    paper = "SALE, arXiv 2505.24179"
    files = ("calibration",)
    renamed: ClassVar[dict[str, str]] = {"local_window": "window"}

    method: Literal["sale"] = "sale"
    numerics: Numerics = "int8"
    tau: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.004
    calibration: str | None = None
    window: Annotated[int, Field(ge=32, le=MOST, multiple_of=32)] = 128
    block_size: Literal[64, 128] = 128

    @property
    def params(self) -> LowBitParams:
        """How blocks are scored."""
        return LowBitParams(self.numerics, self.window)

    def bind(self, shape: ModelShape) -> BoundMethod:
        """See `Method.bind`."""
        thresholds = self.artefact()
        if thresholds is not None:
            check_shape(thresholds.header, shape, place_of(self.calibration))
        return BoundSale(self, thresholds)

    def artefact(self) -> Thresholds | None:
        """See `Method.artefact`."""
        if self.calibration is None:
            return None
        thresholds, place = read_thresholds(self.calibration), place_of(self.calibration)
        for field in ("numerics", "window"):
            theirs, ours = one_line(getattr(thresholds, field), 60), str(getattr(self, field))
            if theirs != ours:
                problem = f"was made with {field} {theirs}, the configuration has {ours}"
                raise FieldError(place, problem, f"set {field}: {theirs}, or {MAKE_ONE}")
        if thresholds.block_size > self.block_size:
            raise FieldError(
                place,
                f"was made with block_size {thresholds.block_size}, and the configuration's {self.block_size} computes "
                "less",
                f"set block_size: {thresholds.block_size}, or {MAKE_ONE}",
            )
        return thresholds

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """See `PrefillMethod.why_dense`."""
        return super().why_dense(call) or self._unservable(call)

    def _unservable(self, call: AttentionCall) -> Dense | None:
        if call.kv_length <= self.params.always_kept:
            return Dense(f"no longer than the {self.params.always_kept} tokens that are always kept")
        return None if call.scale > 0 else Dense(f"scale {call.scale} is not positive")

    def select(self, call: AttentionCall, grid: BlockGrid) -> Selection:
        """Select with the same `tau` for every head; see `PrefillMethod.select`."""
        return self._select_at(call, grid, _on_device((self.tau,) * call.q.shape[1], call.q.device))

    def _select_at(self, call: AttentionCall, grid: BlockGrid, tau: torch.Tensor) -> Selection:
        words = decisions(call, tau, self.params)
        return Selection(tiles(words, grid), decided_pairs=decided_pairs(words, call), is_causal=True)

    def plan_at(self, call: AttentionCall, tau: torch.Tensor) -> BlockPlan | Dense:
        """The plan at given thresholds, without `min_length`; for a search that tries many thresholds.

        Args:
            call: the call.
            tau: float32 `[Hq]` on the device of the call.
        """
        if dense := self._unservable(call):
            return dense
        grid = BlockGrid.of(call, self.block_size)
        return self._select_at(call, grid, tau).plan(grid, self.dense_tokens(call))


class BoundSale(BoundPrefill):
    """SALE with the thresholds of a model.

    Attributes:
        thresholds: the content of the calibration; None without one.
    """

    settings: Sale

    def __init__(self, settings: Sale, thresholds: Thresholds | None) -> None:
        super().__init__(settings)
        self.thresholds = thresholds

    def role(self, layer: int) -> str:
        """Whether the layer's thresholds were found for the model."""
        return "uncalibrated" if self.thresholds is None else "calibrated"

    def remark(self) -> str:
        """See `BoundMethod.remark`."""
        if self.thresholds is not None:
            return ""
        tau = self.settings.tau
        return f"sale: uncalibrated, tau {tau} for every head; {MAKE_ONE} and set prefill.calibration: FILE"

    def head_thresholds(self, layer: int, num_heads: int) -> tuple[float, ...]:
        """The threshold of each query head of a layer."""
        if self.thresholds is None:
            return (self.settings.tau,) * num_heads
        return tuple(self.thresholds.tau[layer].tolist())

    def plan(self, call: AttentionCall) -> Plan:
        """See `BoundMethod.plan`."""
        if call.kv_length < self.settings.min_length:
            return self.settings.short
        heads = call.q.shape[1] * call.shard.size
        thresholds = self.head_thresholds(call.layer, heads)
        if len(thresholds) != heads:
            return Dense("the calibration has more heads than the call (tensor parallelism other than Transformers')")
        thresholds = call.shard.part(thresholds)
        if max(thresholds) < DENSE_BELOW:
            return Dense("tau: 0 for every head")
        return self.settings.plan_at(call, _on_device(thresholds, call.q.device))


@lru_cache(maxsize=1024)
def _on_device(thresholds: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The thresholds on a device, float32 `[Hq]`. They are cached: copying numbers to a GPU makes the host wait."""
    return torch.tensor(thresholds, dtype=torch.float32, device=device)
