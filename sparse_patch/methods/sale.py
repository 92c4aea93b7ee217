"""SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling (2025).

For every tile of 64 queries of every head, a block of 32 keys is read if some query of the tile gives some key of the
block an attention above `tau`, relative to its attention to the sink and to the keys near it. Attention to those is
exact, to the others it is estimated from quantised queries and keys. `ops.scores` defines the decision. arXiv
2505.24179; code: BirdChristopher/SALE.

The thresholds belong to a model: its paper finds one for each head, offline, so that the head's output stays within an
error. Without a calibration one threshold serves all heads, which the paper does not do: the report says so.

This differs from the public code in the following:

- It estimates in 8 bits unless asked for 4: Hopper multiplies no 4-bit integers, and 8 bits are closer to the truth.
  Thresholds found with one are not those of the other, so a calibration names its numerics.
- Attention is computed in tiles of `block_size`, in the model's precision: blocks that hold a kept one are read whole,
  a superset of what was decided. The code gathers blocks of 32, or multiplies in 8 bits.
- `window` is what it says (in the code the argument is ignored; 128 is what it has where it makes a map of
  blocks, and 256 where it calibrates).
- KV heads are not repeated, and quantised once. Any batch size, left padding (each row counts from its first real
  token), chunked prefill (a chunk that begins on a tile's edge decides what the whole prompt would, up to the mean of
  the keys that were there by then) and the model's own scale and softcap.

A query tile looks at no score of a later key; only the mean that is taken off all keys knows of later ones.
"""

from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from sparse_patch.artefacts.base import check_shape
from sparse_patch.artefacts.thresholds import MAKE_ONE, Thresholds, read_thresholds
from sparse_patch.call import AttentionCall, causal_pairs
from sparse_patch.errors import one_line
from sparse_patch.files.reading import MOST
from sparse_patch.methods.base.protocol import PrefillMethod
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
        numerics: "int8", or "int4" as published (for comparisons: it is slower).
        tau: relative attention above which a key makes its block be read, of every head; below 1e-5 all is read. Not
            used with a calibration.
        calibration: safetensors file with a threshold for each head, that `sparse-patch calibrate sale` wrote. A
            relative path counts from the folder of the YAML file that names it. None for `tau` everywhere.
        window: keys before the end of a query tile that are always read, in tokens; a multiple of 32.
        block_size: side in tokens of the tiles that are computed: every one that holds a block that was kept.
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

    @model_validator(mode="after")
    def _calibration_fits(self) -> Self:
        if self.thresholds is None:
            return self
        place = f"calibration: {one_line(self.calibration)}"
        for field in ("numerics", "window"):
            theirs, ours = one_line(getattr(self.thresholds, field), 60), str(getattr(self, field))
            if theirs != ours:
                raise ValueError(
                    f"{place}: was made with {field} {theirs}, the configuration has {ours}; "
                    f"set {field}: {theirs}, or {MAKE_ONE}"
                )
        if self.thresholds.block_size > self.block_size:
            raise ValueError(
                f"{place}: was made with block_size {self.thresholds.block_size}, and the "
                f"configuration's {self.block_size} computes less; set block_size: {self.thresholds.block_size}, or "
                f"{MAKE_ONE}"
            )
        return self

    @cached_property
    def thresholds(self) -> Thresholds | None:
        """What the calibration holds; None without one."""
        return None if self.calibration is None else read_thresholds(self.calibration)

    @property
    def rule(self) -> LowBitParams:
        """How blocks are scored."""
        return LowBitParams(self.numerics, self.window)

    def for_model(self, shape: ModelShape) -> Self:
        """Raises if the calibration is one of another model; see `Method.for_model`."""
        if self.thresholds is not None:
            check_shape(self.thresholds.header, shape, f"calibration: {one_line(self.calibration)}")
        return self

    def role(self, layer: int) -> str:
        """Whether the layer's thresholds were found for the model."""
        return "uncalibrated" if self.thresholds is None else "calibrated"

    def remark(self) -> str:
        """See `Method.remark`."""
        if self.thresholds is not None:
            return ""
        return f"sale: uncalibrated, tau {self.tau} for every head; {MAKE_ONE} and set prefill.calibration: FILE"

    def head_thresholds(self, layer: int, num_heads: int) -> tuple[float, ...]:
        """The threshold of each query head of a layer."""
        if self.thresholds is None:
            return (self.tau,) * num_heads
        return tuple(self.thresholds.tau[layer].tolist())

    def plan(self, call: AttentionCall) -> Plan:
        """Decide for every head and query tile; see `Method.plan`."""
        if short := self.why_dense(call):
            return short
        heads = call.q.shape[1] * call.shard.size
        thresholds = self.head_thresholds(call.layer, heads)
        if len(thresholds) != heads:
            return Dense("the calibration has more heads than the call (tensor parallelism other than Transformers')")
        thresholds = call.shard.part(thresholds)
        if max(thresholds) < DENSE_BELOW:
            return Dense("tau: 0 for every head")
        return self.plan_at(call, _on_device(thresholds, call.q.device))

    def plan_at(self, call: AttentionCall, tau: torch.Tensor) -> BlockPlan | Dense:
        """The plan at given thresholds, float32 `[Hq]` on the device of the call; a search tries many."""
        if call.kv_length <= self.rule.always_kept:
            return Dense(f"no longer than the {self.rule.always_kept} tokens that are always kept")
        if call.scale <= 0:
            return Dense(f"scale {call.scale} is not positive")
        grid = BlockGrid.of(call, self.block_size)
        blocks, decided = self._decided(call, tau, grid)
        if not grid.padded:  # then the rows are as long as the call, which is not short
            return replace(BlockPlan.from_blocks(blocks, grid, is_causal=True), decided_pairs=decided)
        short_rows = (grid.lengths < self.min_length)[:, None]
        causal = causal_pairs(grid.q_start, grid.kv_length, grid.row_starts)[:, None]
        plan = BlockPlan.from_blocks(blocks.logical_or_(short_rows[..., None, None]), grid)
        return replace(plan, decided_pairs=torch.where(short_rows, causal, decided))

    def _decided(self, call: AttentionCall, tau: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks that hold a decision, bool `[B, Hq, NQ, N]`, and the pairs that were decided on."""
        words = decisions(call, tau, self.rule)
        return tiles(words, grid), decided_pairs(words, call)


@lru_cache(maxsize=1024)
def _on_device(thresholds: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Float32 `[Hq]`. Kept, because bringing numbers to a GPU makes the host wait for it."""
    return torch.tensor(thresholds, dtype=torch.float32, device=device)
