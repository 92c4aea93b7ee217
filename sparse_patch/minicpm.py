"""MiniCPM 1, 2, 4 and 4.1 as native Transformers models; the code that a checkpoint brings along never runs.

Transformers has no dense MiniCPM of its own, and the checkpoints' code does not ask its attention interface. But
MiniCPM is a Llama with four constants, and Granite is the same Llama with the same constants under other names:

    embeddings  x scale_emb                              embedding_multiplier
    residuals   x scale_depth / sqrt(num_hidden_layers)  residual_multiplier
    logits      / (hidden_size / dim_model_base)         logits_scaling
    q.k         x head_dim ** -0.5                       attention_multiplier

so the weights, whose names are equal, are loaded into `GraniteForCausalLM`. Sources: MiniCPM (arXiv 2404.06395),
MiniCPM4 (arXiv 2506.07900) and Transformers' Granite. Neither published weights nor the code beside them were at hand:
what is said of that code below is from memory.

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
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from huggingface_hub import snapshot_download
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
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_utils import load_state_dict
from transformers.utils.hub import cached_file

from sparse_patch.errors import SparsePatchError, one_line, reason, short
from sparse_patch.methods.base import MOST
from sparse_patch.reading import read_json

MODEL_TYPE = "minicpm"
_ARCHITECTURE = "MiniCPMForCausalLM"
_LM_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # each alone, or in parts with an index; in Transformers' order
_ROPE_TYPES = ("default", "linear", "dynamic", "longrope")

Size = Annotated[int, Field(gt=0, le=2**24)]  # of a weight: the number of elements of two such sizes can be computed


class _Rope(BaseModel):
    """A kind of rotary embedding; its fields are those of `rope_scaling` in the checkpoint."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    rope_theta: PositiveFloat

    def parameters(self, max_position_embeddings: int) -> dict[str, Any]:
        """Transformers' `rope_parameters`."""
        return self.model_dump()


class _Default(_Rope):
    """As Llama's."""

    rope_type: Literal["default"]


class _Scaled(_Rope):
    """All frequencies divided by a factor; or dynamic NTK, where the base grows with the length."""

    rope_type: Literal["linear", "dynamic"]
    factor: float = Field(ge=1)


class _LongRope(_Rope):
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


class _MiniCPM(_Carried):
    """A checkpoint's config.json, as far as it decides what the model computes."""

    architectures: list[str] | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    scale_emb: PositiveFloat
    scale_depth: PositiveFloat
    dim_model_base: PositiveFloat
    rope_scaling: Annotated[_Default | _Scaled | _LongRope, Field(discriminator="rope_type")]
    tie_word_embeddings: bool | None = None
    sparse_config: dict[str, Any] | None = None
    num_experts: int | None = None
    quantization_config: Any = None

    @model_validator(mode="before")
    @classmethod
    def _one_rope(cls, data: dict[str, Any]) -> dict[str, Any]:
        """RoPE in one place: Transformers 5 saves `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
        scaling = data.get("rope_parameters") or data.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            return data
        rope = {"rope_theta": data.get("rope_theta", 10_000.0), "rope_type": scaling.get("type", "default"), **scaling}
        rope.pop("type", None)
        return {**data, "rope_scaling": rope}

    @model_validator(mode="after")
    def _fits(self) -> "_MiniCPM":
        """What one field asks of another, and what Granite has no place for."""
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
        if isinstance(self.rope_scaling, _LongRope):
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


def load_minicpm(
    path: str | Path,
    /,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> GraniteForCausalLM:
    """Load a dense MiniCPM checkpoint as a native Transformers model, in evaluation mode.

    `save_pretrained` of it writes a Granite checkpoint, which `AutoModelForCausalLM` loads. Its config says what was
    carried over: `config.minicpm` has MiniCPM's constants and the kind of RoPE, `config.sparse_config` the settings of
    InfLLM-V2 for the method `infllmv2`, or None; attention is dense until `patch_model`. Embeddings are tied if
    config.json says so, or if it says nothing and the weights have no lm_head.

    Args:
        path: a folder with config.json and weights (safetensors or pytorch_model.bin, whole or in parts), or a hub id.
        dtype: of the weights; "auto" for the one in config.json, else that of the weights.
        device_map: as in Transformers: "cuda", "auto", ...; by default the CPU.
        attn_implementation: as in Transformers.
        revision: of a hub id.

    Raises:
        SparsePatchError: there is no such checkpoint, or it is not a dense MiniCPM, whole and unquantized.
    """
    folder = _folder(path, revision)
    fields = _fields_of(folder)
    weights = _weights_in(folder)
    tied = _LM_HEAD not in weights if fields.tie_word_embeddings is None else fields.tie_word_embeddings
    config = fields.granite(tied)
    _check_weights(folder, weights, config)
    return GraniteForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        device_map=device_map,
        attn_implementation=attn_implementation,
        trust_remote_code=False,
    )


def is_minicpm(path: str | Path) -> bool:
    """Whether a folder or hub id has a config.json of MiniCPM's own, so that `load_minicpm` is the way to load it."""
    try:
        data, _ = PreTrainedConfig.get_config_dict(path)
        return data.get("model_type") == MODEL_TYPE
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # no such file, or no JSON object
        return False


def minicpm_config(path: str | Path) -> GraniteConfig:
    """The config of the model that `load_minicpm` would give, without its weights.

    Raises:
        SparsePatchError: there is no config, or it is not that of a dense MiniCPM.
    """
    fields = _fields_of(path)
    return fields.granite(tied=fields.tie_word_embeddings is not False)


class _Weight(NamedTuple):
    file: Path
    shape: tuple[int, ...]


def _folder(path: str | Path, revision: str | None) -> Path:
    """The checkpoint's folder, downloaded if it is a hub id; no code is fetched."""
    if not isinstance(path, str | os.PathLike):
        raise SparsePatchError(f"load_minicpm: path: expected a folder or a hub id, got {short(path)}")
    if Path(path).is_dir():
        return Path(path)
    try:
        folder = Path(snapshot_download(str(path), revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):  # pickled weights are often there too: only if need be
            snapshot_download(str(path), revision=revision, allow_patterns=["*.json", "*.bin"])
    except (OSError, ValueError) as error:
        raise SparsePatchError(f"{path}: no such folder, and not to be had from the hub: {reason(error)}") from None
    return folder


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


def _fields_of(path: str | Path) -> _MiniCPM:
    data, file = _config_json(path), f"{one_line(path)}/config.json"
    if data.get("model_type") != MODEL_TYPE:
        raise SparsePatchError(
            f"{file}: model_type: expected {MODEL_TYPE!r}, got {short(data.get('model_type'))}; load other "
            "architectures, MiniCPM3 among them, with Transformers' AutoModelForCausalLM"
        )
    try:
        return _MiniCPM.model_validate(data)
    except ValidationError as error:
        raise SparsePatchError(f"{file}: {_explain(error.errors()[0])}") from None


def _explain(error: ErrorDetails) -> str:
    """One line for the first problem that pydantic found."""
    path = one_line(".".join(str(part) for part in error["loc"] if part not in _ROPE_TYPES))
    if error["type"] == "value_error":  # raised by `_fits`, which names the field first
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{path}: missing; copy it from the published checkpoint's config.json"
    if error["type"] == "extra_forbidden":
        return f"{path}: MiniCPM's RoPE has no such field; remove it if it is meant for other software"
    if error["type"].startswith("union_tag"):
        kind = error["input"].get("rope_type") if isinstance(error["input"], Mapping) else error["input"]
        return f"{path}: expected a rope_type of {', '.join(_ROPE_TYPES)}, got {short(kind)}"
    return f"{path}: expected {error['msg'].removeprefix('Input should be ')}, got {short(error['input'])}"


def _weights_in(folder: Path) -> dict[str, _Weight]:
    """Names and shapes of the weights; pickles are read as tensors alone."""
    found: dict[str, _Weight] = {}
    for file in _weight_files(folder):
        try:
            tensors = load_state_dict(str(file), map_location="meta", weights_only=True)
            found |= {name: _Weight(file, tuple(tensor.shape)) for name, tensor in tensors.items()}
        except Exception as error:  # every format has exceptions of its own
            raise SparsePatchError(f"{file}: cannot be read as weights: {reason(error)}") from None
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The files that Transformers would read."""
    for name in _WEIGHTS:
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _parts_of(index)
    raise SparsePatchError(f"{folder}: no weights; expected {' or '.join(_WEIGHTS)}, whole or in parts with an index")


def _parts_of(index: Path) -> list[Path]:
    try:
        names = set(read_json(index)["weight_map"].values())
        files = [index.parent / name for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError):  # ValueError: it is no JSON
        raise SparsePatchError(f"{index}: expected a weight_map of names and files; download it again") from None
    for file in files:
        if not file.is_file():
            raise SparsePatchError(f"{index}: weight_map: there is no {file.name} beside it; download it again")
    return files


def _check_weights(folder: Path, weights: Mapping[str, _Weight], config: GraniteConfig) -> None:
    """Raise unless a model of this config takes the weights as they are: none missing, none over, each of its shape."""
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in GraniteForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings and _LM_HEAD not in weights:
        del expected[_LM_HEAD]
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise SparsePatchError(
            f"{folder}: {len(missing)} of {len(expected)} weights are missing, first {missing[0]}; config.json "
            "does not belong to these weights, or a download is not complete"
        )
    for name, (file, shape) in weights.items():
        if name not in expected and not name.endswith("rotary_emb.inv_freq"):  # a table that old checkpoints keep
            raise SparsePatchError(f"{file}: {name}: a dense MiniCPM by config.json has no such weight")
        if shape != expected.get(name, shape):
            raise SparsePatchError(
                f"{file}: {name}: expected the shape {list(expected[name])} by config.json, got {list(shape)}"
            )
    if config.tie_word_embeddings and _LM_HEAD in weights:
        head, embeddings = (load_state_dict(str(weights[name].file))[name] for name in (_LM_HEAD, _EMBEDDINGS))
        if not torch.equal(head, embeddings):
            raise SparsePatchError(
                f"{folder}/config.json: tie_word_embeddings: true, but {_LM_HEAD} is not {_EMBEDDINGS}; set it to false"
            )
