"""The kinds of rotary embedding of a checkpoint, in Transformers' terms.

LongRoPE divides the frequencies by `short_factor`, or by `long_factor` when the call reaches beyond
`original_max_position_embeddings`, and multiplies cosines and sines by sqrt(1 + log(s) / log(original)), where s is
max_position_embeddings / original. As Transformers does it,

- each call chooses anew, for all its positions and all rows of its batch, by its highest position. Keys in a cache keep
  the factors that they were rotated with, so a text that grows across the length mixes both. MiniCPM's code keeps one
  table, made for max_position_embeddings at first and never made shorter again: with max_position_embeddings > original
  it would use the long factors always;
- cosines and sines are rounded to the model's type before they rotate; MiniCPM's code rotates in float32.
"""

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from sparse_patch.files.reading import MOST

ROPE_TYPES = ("default", "linear", "dynamic", "longrope")


class _Rope(BaseModel):
    """A kind of rotary embedding; its fields are those of `rope_scaling` in the checkpoint."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    rope_theta: PositiveFloat

    def parameters(self, max_position_embeddings: int) -> dict[str, Any]:
        """Transformers' `rope_parameters`."""
        return self.model_dump()


class Default(_Rope):
    """As Llama's."""

    rope_type: Literal["default"]


class Scaled(_Rope):
    """All frequencies divided by a factor; or dynamic NTK, where the base grows with the length."""

    rope_type: Literal["linear", "dynamic"]
    factor: float = Field(ge=1)


class LongRope(_Rope):
    """A divisor for each frequency, one list for short texts and one for long ones."""

    rope_type: Literal["longrope"]
    short_factor: list[PositiveFloat]
    long_factor: list[PositiveFloat]
    original_max_position_embeddings: int = Field(gt=1, le=MOST)

    def parameters(self, max_position_embeddings: int) -> dict[str, Any]:
        original = self.original_max_position_embeddings
        scale = max_position_embeddings / original
        attention_factor = math.sqrt(1 + math.log(scale) / math.log(original))
        # beside attention_factor, factor changes nothing; Transformers warns where it is missing or below 1
        return {**self.model_dump(), "attention_factor": attention_factor, "factor": max(scale, 1.0)}
