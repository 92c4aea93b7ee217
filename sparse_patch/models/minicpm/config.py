"""Read and check a checkpoint's config.json, and translate it into Granite's terms."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails
from transformers import GraniteConfig
from transformers.activations import ACT2FN
from transformers.utils.hub import cached_file

from sparse_patch.errors import SparsePatchError, one_line, reason, short
from sparse_patch.files.reading import MOST, read_json
from sparse_patch.models.minicpm.rope import ROPE_TYPES, Default, LongRope, Scaled

MODEL_TYPE = "minicpm"
_ARCHITECTURE = "MiniCPMForCausalLM"
Size = Annotated[int, Field(gt=0, le=2**24)]  # of a weight; the product of two such sizes does not overflow


class _Carried(BaseModel):
    """Fields that MiniCPM and Granite have under the same name."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, allow_inf_nan=False)

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: int = Field(ge=1, le=10_000)
    num_attention_heads: Size
    max_position_embeddings: int = Field(gt=1, le=MOST)
    rms_norm_eps: PositiveFloat
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: NonNegativeInt | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(
        None, validation_alias=AliasChoices("dtype", "torch_dtype")
    )


class MiniCPM(_Carried):
    """The fields of a checkpoint's config.json that decide what the model computes."""

    architectures: list[str] | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    scale_emb: PositiveFloat
    scale_depth: PositiveFloat
    dim_model_base: PositiveFloat
    rope_scaling: Annotated[Default | Scaled | LongRope, Field(discriminator="rope_type")]
    tie_word_embeddings: bool | None = None
    sparse_config: dict[str, Any] | None = None
    num_experts: int | None = None
    quantization_config: Any = None

    @model_validator(mode="before")
    @classmethod
    def _one_rope(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Put RoPE in one field: Transformers 5 has `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
        scaling = data.get("rope_parameters") or data.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            return data
        rope = {"rope_theta": data.get("rope_theta", 10_000.0), "rope_type": scaling.get("type", "default"), **scaling}
        rope.pop("type", None)
        return {**data, "rope_scaling": rope}

    @model_validator(mode="after")
    def _fits(self) -> "MiniCPM":
        """Check what one field requires of another, and refuse what Granite cannot represent."""
        if self.architectures and _ARCHITECTURE not in self.architectures:
            raise ValueError(f"architectures: expected {_ARCHITECTURE}, got {short(self.architectures)}")
        if self.num_experts:
            raise ValueError(f"num_experts: {self.num_experts}: a mixture of experts; only dense MiniCPM can be loaded")
        if self.quantization_config is not None:
            raise ValueError("quantization_config: quantized weights cannot be loaded; take the unquantized checkpoint")
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act: {short(self.hidden_act)} is not known to Transformers; only dense MiniCPM can be loaded"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: {self.hidden_size} is no multiple of {self.num_attention_heads} heads; set head_dim"
            )
        if self.width % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.width}")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of num_attention_heads {self.num_attention_heads}, "
                f"got {self.kv_heads}"
            )
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id: expected less than vocab_size {self.vocab_size}, got {self.pad_token_id}")
        if isinstance(self.rope_scaling, LongRope):
            for name in ("short_factor", "long_factor"):
                got = len(getattr(self.rope_scaling, name))
                if got != self.width // 2:
                    raise ValueError(
                        f"rope_scaling.{name}: expected {self.width // 2} numbers (head_dim / 2), got {got}"
                    )
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def width(self) -> int:
        """head_dim."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def granite(self, tied: bool) -> GraniteConfig:
        """The same model in Granite's terms."""
        fields: dict[str, Any] = self.model_dump(include=set(_Carried.model_fields))
        fields |= {
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.width,
            "embedding_multiplier": self.scale_emb,
            "residual_multiplier": self.scale_depth / math.sqrt(self.num_hidden_layers),
            "logits_scaling": self.hidden_size / self.dim_model_base,
            "attention_multiplier": self.width**-0.5,
            "rope_parameters": self.rope_scaling.parameters(self.max_position_embeddings),
            "tie_word_embeddings": tied,
            "sparse_config": self.sparse_config,
            "minicpm": {
                "scale_emb": self.scale_emb,
                "scale_depth": self.scale_depth,
                "dim_model_base": self.dim_model_base,
                "rope_type": self.rope_scaling.rope_type,
            },
        }
        return GraniteConfig(**fields)


def _config_json(path: str | Path) -> dict[str, Any]:
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        try:
            file = Path(str(cached_file(str(path), "config.json")))
        except (OSError, ValueError) as error:
            raise SparsePatchError(f"{one_line(path)}: config.json cannot be read: {reason(error)}") from None
    data = read_json(file) if file.exists() else None
    if not data:
        raise SparsePatchError(
            f"{one_line(path)}: has no config.json, or an empty one; name the folder of a checkpoint"
        )
    if not isinstance(data, dict):
        raise SparsePatchError(f"{one_line(file)}: expected a JSON object, got {short(data)}")
    return data


def read_config(path: str | Path) -> MiniCPM:
    data, file = _config_json(path), f"{one_line(path)}/config.json"
    if data.get("model_type") != MODEL_TYPE:
        raise SparsePatchError(
            f"{file}: model_type: expected {MODEL_TYPE!r}, got {short(data.get('model_type'))}; load other "
            "architectures, MiniCPM3 among them, with Transformers' AutoModelForCausalLM"
        )
    try:
        return MiniCPM.model_validate(data)
    except ValidationError as error:
        raise SparsePatchError(f"{file}: {_explain(error.errors()[0])}") from None


def _explain(error: ErrorDetails) -> str:
    """One line for the first problem that pydantic found."""
    path = one_line(".".join(str(part) for part in error["loc"] if part not in ROPE_TYPES))
    if error["type"] == "value_error":  # raised by `_fits`, which names the field first
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{path}: missing; copy it from the published checkpoint's config.json"
    if error["type"] == "extra_forbidden":
        return f"{path}: MiniCPM's RoPE has no such field; remove it if it is meant for other software"
    if error["type"].startswith("union_tag"):
        kind = error["input"].get("rope_type") if isinstance(error["input"], Mapping) else error["input"]
        return f"{path}: expected a rope_type of {', '.join(ROPE_TYPES)}, got {short(kind)}"
    return f"{path}: expected {error['msg'].removeprefix('Input should be ')}, got {short(error['input'])}"
