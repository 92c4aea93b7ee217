"""The kinds of rotary embedding of a checkpoint, in Transformers' terms.

LongRoPE divides the frequencies by `short_factor`, or by `long_factor` if the call reaches beyond
`original_max_position_embeddings`. It multiplies cosines and sines by sqrt(1 + log(s) / log(original)), where s is
max_position_embeddings / original. Transformers differs from MiniCPM's code in two points:

- In Transformers each call chooses the factors anew by its highest position, for all its positions and all rows of its
  batch. Keys in a cache keep the factors that they were rotated with, so a text that grows across the length mixes
  both. MiniCPM's code keeps one table, which is first made for max_position_embeddings and never made shorter. With
  max_position_embeddings > original it would always use the long factors.
- Transformers rounds cosines and sines to the model's dtype before rotating. MiniCPM's code rotates in float32.
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
    """All frequencies are divided by a factor; or dynamic NTK, in which the base grows with the length."""

    rope_type: Literal["linear", "dynamic"]
    factor: float = Field(ge=1)


class LongRope(_Rope):
    """A divisor for each frequency, with one list for short texts and one for long texts."""

    rope_type: Literal["longrope"]
    short_factor: list[PositiveFloat]
    long_factor: list[PositiveFloat]
    original_max_position_embeddings: int = Field(gt=1, le=MOST)

    def parameters(self, max_position_embeddings: int) -> dict[str, Any]:
        original = self.original_max_position_embeddings
        scale = max_position_embeddings / original
        attention_factor = math.sqrt(1 + math.log(scale) / math.log(original))
        # With attention_factor set, factor has no effect; but Transformers warns if it is missing or below 1.
        return {**self.model_dump(), "attention_factor": attention_factor, "factor": max(scale, 1.0)}
