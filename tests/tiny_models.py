"""A tiny random model of any causal class of the installed Transformers, by rules about the names of config fields.

There is no code for single classes here. A rule says what every field of a name becomes, in the config and in the
configs within it. Fields that no rule names keep the class's values.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 96
HIDDEN, HEADS, HEAD_DIM = 64, 4, 16  # HIDDEN = HEADS * HEAD_DIM
WINDOW = 48  # shorter than the prompts
STD = 0.2  # with the usual 0.02 attention is almost uniform, and a wrong mask hardly moves the logits

# Kinds of layers that a class may have besides those of its default config.
LAYER_KINDS = sorted(kind for kind in ALLOWED_LAYER_TYPES if re.search(r"_attention$|_sparse$|^hybrid|^conv", kind))
KV_HEADS = -1  # as many as asked for
# The new size by the field's name; the first matching pattern counts. A size of 0 or None stays.
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size|hash_byte_group_vocab", VOCAB),
    (r"^n(um)?_mamba_heads$|^mamba_n(um)?_heads$", 2 * HIDDEN // HEAD_DIM),  # heads * head_dim = 2 * hidden
    (r"^mamba_d_ssm$|^d_inner$", 2 * HIDDEN),
    (r"^(linear|index)_(num|n)_key_heads$", 2),
    (r"(^|_)(n|num)(_\w+)?_(key_value|kv)_heads$|^kv_n_heads$|^num_query_groups$|^n_head_kv$", KV_HEADS),
    (r"^(n|num)_heads?$|attention_heads$|^(linear|index)_(n|num)(_value)?_heads$|^n_heads?$", HEADS),
    (r"^global_head_dim$|^index_head_dim$|^qk_head_dim$", 2 * HEAD_DIM),
    (r"head_?(dim|size)$|^d_head$|^mamba_d_head$|^d_kv$|^dim_head$|^kv_channels$|^rotary_dim$", HEAD_DIM),
    (r"^per_layer|_per_layer_input$|_embed_dim$|^d_rel$", HEAD_DIM),
    (r"^(hidden_size|hidden_size_global|embed_dim|n_embd|d_model|dim_model|emb_dim|embedding_dim)$", HIDDEN),
    (r"^(embedding_size|word_embed_proj_dim|input_embedding_size|lru_width|backbone_hidden_size)$", HIDDEN),
    (r"^(moe|(shared_)?expert)\w*(intermediate|ffn_hidden)_size$", 32),
    (r"intermediate_size(_mlp)?$|ffn_dim$|^n_inner$|^d_ff$|^dff$|^dim_ff$|ffn_hidden_size$|^feed_forward_size$", 96),
    (r"^(moe_)?(n|num)(_local|_routed)?_experts$|^zero_expert_num$", 4),
    (r"experts_per_tok(en)?$|^moe_top_?k$|^moe_k$", 2),
    (r"^(n_group|num_expert_group|topk_group|num_shared_experts|n_shared_experts|moe_num_shared_experts)$", 1),
    (r"^max_position_embeddings$|^n_positions$|^n_ctx$|^max_seq_len$|^model_max_length$|^context_length$", 4096),
    (r"^max_target_positions$", 4096),
    (r"^(state_size|ssm_state_size|mamba_d_state)$", 16),
    (r"^(time_step_rank|mamba_dt_rank)$", 4),
    (r"rank$", 16),
    (r"^sliding_window(_size)?$|^attention_window_size$|^window_size$|^local_attention$|^keep_window_size$", WINDOW),
    (r"^attention_chunk_size$", 64),
    (r"^index_topk$", 32),
    (r"^index_topk_blocks$", 4),
    (r"^index_block_size$", 16),
    (r"chunk_size$", 32),
    (r"(period|interval|pattern|every_n_layers|sparse_step)$", 2),
    (r"layer_offset$|^first_k_dense_replace$|^num_dense_layers$|^num_mem_blocks$", 1),
    (r"^num_nextn_predict_layers$", 0),
    (r"^num_kv_shared_layers$", 2),
    (r"^image_size$", 56),
    (r"^patch_size$", 14),
)
LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|layers|(num_)?(de|en)coder_layers|num_blocks)$")
ALTERNATES = r"(period|interval|pattern|every_n_layers)$|^attn_layer_indices$|^layer_types$"
DROPOUT = re.compile(r"dropout|pdrop|layerdrop|drop_path")
INITIALIZER = re.compile(r"^(embedding_)?initializer_range$|init(ializer)?_std$")
OTHERS: dict[str, Any] = {
    **{"is_decoder": True, "use_cache": True, "is_encoder_decoder": False, "tie_word_embeddings": False},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1},
    **{"forced_eos_token_id": None, "forced_bos_token_id": None, "begin_suppress_tokens": None},
}
# Values instead of None for fields that a class needs.
FILLED: dict[str, Any] = {
    **{"head_dim": HEAD_DIM, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    **{"num_key_value_heads": HEADS, "clip_qkv": 8.0},
    **{"indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM},
    **{"indexer_budget": 32, "indexer_compress_ratio": 4},
    **{"attn_layer_indices": [1, 3], "layer_types": ["conv", "full_attention"] * 2, "default_language": "en_XX"},
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
KEEP = {"transformers_version", "model_type", "architectures", "dtype", "torch_dtype", "id2label", "label2id"}


@cache
def causal_classes() -> dict[str, str]:
    """Name -> module of the causal classes of the installed Transformers.

    These are the classes whose names end in ForCausalLM, and all others that `AutoModelForCausalLM` makes.
    """
    wanted = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _tuple(names)}
    found: dict[str, str] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        if path.parent.name == "auto" or path.stem.startswith(("modeling_tf_", "modeling_flax_")):
            continue
        for name in re.findall(r"^class (\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            if name in wanted or name.endswith("ForCausalLM"):
                found.setdefault(name, f"transformers.models.{path.parent.name}.{path.stem}")
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def tiny_models(name: str) -> list[Callable[[], PreTrainedModel]]:
    """Functions that make tiny models of a class, seeded, in float32 and eval mode. Use the first one that works.

    They differ in what not every class accepts: all kinds of layers that its code names, or only the one kind of its
    config; two KV heads for four query heads, or as many KV heads as query heads.
    """
    source = Path(sys.modules[_class_of(name).__module__].__file__ or "").read_text(encoding="utf-8")
    named = tuple(kind for kind in LAYER_KINDS if f'"{kind}"' in source)
    return [partial(tiny_model, name, kv_heads, kinds) for kinds in (named, ()) for kv_heads in (2, HEADS)]


def tiny_model(name: str, kv_heads: int, kinds: tuple[str, ...]) -> PreTrainedModel:
    """Make one of the tiny models."""
    model_class = _class_of(name)
    torch.manual_seed(0)
    return randomised(model_class(tiny_config(model_class.config_class, kv_heads, kinds)).float().eval())


def tiny_config(
    config_class: type[PreTrainedConfig], kv_heads: int = 2, kinds: tuple[str, ...] = ()
) -> PreTrainedConfig:
    """The default config of a class, with every size made small."""
    config: PreTrainedConfig = config_class.from_dict(_shrunk(config_class().to_dict(), kv_heads, kinds))
    return config


def _class_of(name: str) -> Any:
    return getattr(importlib.import_module(causal_classes()[name]), name)


@torch.no_grad()
def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Give the model large random matrices, and vectors that are not zero, because zeros hide faults."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1 or not parameter.isfinite().all() or not parameter.any():
            parameter.copy_(STD * torch.randn(parameter.shape, generator=generator))
    return model


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


@dataclass(frozen=True)
class _Layers:
    """The layers of a config, as it was and as it will be.

    Attributes:
        before: number of layers before.
        number: number of layers afterwards.
        lists: fields with an item for each layer, as they were before.
    """

    before: int
    number: int
    lists: dict[str, Any]

    @classmethod
    def of(cls, values: dict[str, Any]) -> _Layers:
        """Three layers, or every kind of layer twice; three times if the last layers read the keys of others."""
        before = next((value for key, value in values.items() if LAYERS.match(str(key)) and _is_size(value)), 0)
        lists = {key: value for key, value in values.items() if before > 1 and _is_by_layer(key, value, before)}
        kinds = max((len(_distinct(value)) for value in lists.values()), default=1)
        alternate = kinds == 1 and any(re.search(ALTERNATES, str(key)) for key in values)
        times = 3 if values.get("num_kv_shared_layers") else 2
        return cls(before, 4 if alternate else max(3, min(times * kinds, 8)), lists)

    def like(self, layer: int) -> int:
        """The first old layer of the same kind as a new layer."""
        new = [_cycled(items, self.number)[layer] for items in self.lists.values()]
        old = zip(*self.lists.values(), strict=True)
        return next((i for i, items in enumerate(old) if list(items) == new), layer)

    def indices(self, value: list[int]) -> list[int]:
        """A list of layers, translated to new layers of the same kinds, or cut to those that still exist."""
        for items in self.lists.values():
            kinds = {repr(items[i]) for i in value if i < len(items)}
            if value == [i for i, item in enumerate(items) if repr(item) in kinds]:
                return [i for i, item in enumerate(_cycled(items, self.number)) if repr(item) in kinds]
        return [i for i in value if i < self.number] or value[:0] or [1] * bool(value)


def _is_by_layer(key: Any, value: Any, layers: int) -> bool:
    """Whether a value is a list with an item per layer, or a pattern with a letter per layer."""
    listed = isinstance(value, list | tuple) or (isinstance(value, str) and "pattern" in str(key))
    return listed and len(value) == layers


def _distinct(items: Any) -> list[Any]:
    return list({repr(item): item for item in items}.values())


def _cycled(items: Any, number: int) -> list[Any]:
    """Repeat the distinct items in turn, up to `number` items."""
    kinds = _distinct(items)
    return [kinds[i % len(kinds)] for i in range(number)]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _of_all_kinds(values: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    """The fields, with layers of these kinds added if there is only one kind."""
    return {
        key: _cycled([*value, *kinds], len(value))
        if key in ("layer_types", "layers_block_type") and value and len(_distinct(value)) == 1
        else value
        for key, value in values.items()
    }


def _shrunk(values: dict[str, Any], kv_heads: int, kinds: tuple[str, ...] = ()) -> dict[str, Any]:
    """The small fields of a config, or of a config within it."""
    values = _of_all_kinds(values, kinds)
    layers = _Layers.of(values)
    small: dict[str, Any] = {}
    for key, value in values.items():
        if key in KEEP or not isinstance(key, str):
            small[key] = value
        elif LAYERS.match(key) and _is_size(value):
            small[key] = layers.number
        elif key in layers.lists:
            items = _cycled([_of_layer(key, item, kv_heads) for item in value], layers.number)
            small[key] = "".join(items) if isinstance(value, str) else items
        elif key == "per_layer_config" and value:
            of_old = {int(layer): _shrunk(fields, kv_heads) for layer, fields in value.items()}
            like = {layer: layers.like(layer) for layer in range(layers.number)}
            small[key] = {layer: of_old[old] for layer, old in like.items() if old in of_old}
        else:
            small[key] = _field(key, value, values, layers, kv_heads, kinds)
    return small


def _of_layer(key: str, item: Any, kv_heads: int) -> Any:
    if isinstance(item, dict):
        return _shrunk(item, kv_heads)
    return _size(key.removesuffix("_per_layer"), item, kv_heads) if _is_size(item) else item


def _field(key: str, value: Any, values: dict[str, Any], layers: _Layers, kv_heads: int, kinds: tuple[str, ...]) -> Any:
    """The small value of one field that is not about single layers."""
    if key in OTHERS:
        return OTHERS[key]
    if key in ("sliding_window", "use_sliding_window") and "sliding_attention" in kinds:
        return WINDOW if key == "sliding_window" else True
    if value is None:
        return FILLED.get(key)
    if isinstance(value, dict):
        value = _rope(_shrunk(value, kv_heads)) if "rope" in key else _shrunk(value, kv_heads, kinds)
        return SPECIAL[key](value, values, layers) if key in SPECIAL else value
    if DROPOUT.search(key) and isinstance(value, int | float) and not isinstance(value, bool):
        return type(value)(0)
    if INITIALIZER.search(key) and isinstance(value, float):
        return STD
    if re.search(r"token_(id|index)$|^mask_index$|^unk_index$", key) and _is_size(value):
        return min(value, VOCAB - 1)
    if key in SPECIAL:
        return SPECIAL[key](value, values, layers)
    if re.search(r"layers|idx|indices|_ids$", key) and isinstance(value, list) and all(map(_is_size, value)):
        return layers.indices(value)
    return _size(key, value, kv_heads) if _is_size(value) else value


def _size(key: str, value: int, kv_heads: int) -> int:
    """A size by the rules of `SIZES`, which enlarge only sizes that must fit the head dimension."""
    rule = next((small for pattern, small in SIZES if re.search(pattern, key)), None)
    if rule is None or value <= 0:
        return value
    if rule is KV_HEADS:
        return min(value, kv_heads)
    return rule if re.search(r"head_?(dim|size)|d_head|position", key) else min(value, rule)


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters with an item per rotated pair, cut to the smaller number of pairs."""
    pairs = HEAD_DIM // 2
    small = dict(values)
    for key in ("short_factor", "long_factor"):
        if values.get(key):
            small[key] = values[key][:pairs]
    if values.get("mrope_section"):
        small["mrope_section"] = [pairs // 4, pairs // 4, pairs - 2 * (pairs // 4)]
    return small


def _ratio(values: dict[str, Any]) -> int:
    """The factor by which Zamba's attention is wider than its hidden size."""
    return max(int(values.get("attention_hidden_size") or 0) // int(values["hidden_size"]), 1)


# Fields whose small value depends on others: function of the value, all old fields, and the layers.
SPECIAL: dict[str, Callable[[Any, dict[str, Any], _Layers], Any]] = {
    "attention_hidden_size": lambda _, values, __: HIDDEN * _ratio(values),
    "attention_head_dim": lambda _, values, __: HEAD_DIM * _ratio(values),
    "axial_pos_embds_dim": lambda value, *_: [HIDDEN * part // sum(value) for part in value],
    "attention_types": lambda value, _, layers: [[value[0][0], layers.number // len(value[0][0])]],
    "num_heads": lambda value, values, _: min(value, 2 * HEADS if "state_size" in values else HEADS),
    "head_dim": lambda value, values, _: HEAD_DIM * (2 if value > (values.get("qk_rope_head_dim") or value) else 1),
    "rope_parameters": lambda value, values, _: (
        value or {kind: dict(ROPE) for kind in set(values["layer_types"] or ())}
    ),
    "attn_config": lambda value, *_: {**value, **ROPE},
    "qk_dim_factor": lambda *_: 1.0,
    "num_layers_per_stack": lambda *_: None,  # computed from the number of layers
}
