"""Tiny random models, one per attention dialect that `sparse_patch` has to get right.

Nothing is downloaded. All models are float32, in eval mode and seeded, so two calls of a factory give two models with
equal weights. Weights are large on purpose: with the usual 0.02, attention is almost uniform, and a wrong mask, a wrong
scale or a lost soft cap hardly changes the logits. Sliding windows are shorter than the tests' prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from sparse_patch import load_minicpm

RECENT = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 18)  # its `generate` drops a mask of ones
VOCAB = 96
WINDOW = 12  # shorter than every prompt of the tests, and not a divisor of their chunk size
IMAGE_TOKEN = VOCAB - 1  # only `vlm` treats it as a placeholder
IMAGE_TOKENS = 16  # longer than WINDOW: a bidirectional image block reaches beyond the sliding window

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # generation never stops early
    "tie_word_embeddings": False,
}


def _build(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """`transformers.<name>ForCausalLM` on a tiny config, seeded, in eval mode."""
    torch.manual_seed(seed)
    config_name = f"{name}TextConfig" if name in ("Gemma3", "Gemma3n", "Gemma4", "Qwen3_5") else f"{name}Config"
    config = getattr(transformers, config_name)(**{**COMMON, **overrides})
    return getattr(transformers, f"{name}ForCausalLM")(config).float().eval()


def llama(layers: int = 3) -> PreTrainedModel:
    """The plain case: grouped-query attention without window or soft cap."""
    return _build("Llama", num_hidden_layers=layers)


def mistral() -> PreTrainedModel:
    """A sliding window on every layer, which the attention function gets only as a keyword."""
    return _build("Mistral", sliding_window=WINDOW)


def qwen2() -> PreTrainedModel:
    """A group of 7 query heads per KV head (not a power of two), and biases."""
    return _build("Qwen2", hidden_size=112, num_attention_heads=14, use_sliding_window=False)


def qwen2_windowed() -> PreTrainedModel:
    """A full layer, then layers with a sliding window."""
    return _build("Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)


def qwen3() -> PreTrainedModel:
    """Query and key norms; head_dim differs from hidden_size / heads."""
    return _build("Qwen3", head_dim=32)


def mistral_full() -> PreTrainedModel:
    """No window, as in later versions."""
    return _build("Mistral", sliding_window=None)


def llama4() -> PreTrainedModel:
    """Layers with chunks of 64 tokens and RoPE, and full layers without RoPE whose queries are scaled by position."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2}
    chunks = {"attention_chunk_size": 64, "no_rope_layers": [1, 0, 1, 0], "floor_scale": 32}
    shape = {"num_hidden_layers": 4, "head_dim": 16}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**{**COMMON, **experts, **chunks, **shape}))
    for module in model.modules():
        if isinstance(module, Llama4TextExperts):  # the class does not initialise it
            torch.nn.init.normal_(module.gate_up_proj, std=0.2), torch.nn.init.normal_(module.down_proj, std=0.2)
    return model.float().eval()


def qwen3_moe() -> PreTrainedModel:
    """Qwen3's attention beside experts."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _build("Qwen3Moe", head_dim=32, **experts)


_LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"num_hidden_layers": 4, "full_attention_interval": 2, "head_dim": 32},
}


def qwen3_next() -> PreTrainedModel:
    """Linear attention on every other layer, gated full attention on the others, experts."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _build("Qwen3Next", **_LINEAR, **experts, shared_expert_intermediate_size=32)


def qwen3_5() -> PreTrainedModel:
    """The same layers without experts."""
    return _build("Qwen3_5", **_LINEAR)


def gemma() -> PreTrainedModel:
    """head_dim 256, one KV head."""
    return _build("Gemma", num_attention_heads=2, num_key_value_heads=1, head_dim=256)


def gemma2() -> PreTrainedModel:
    """Soft cap 50, windows on every other layer, eager by default. Its scale is large enough for the cap to matter."""
    return _build("Gemma2", num_hidden_layers=4, head_dim=16, query_pre_attn_scalar=2, sliding_window=WINDOW)


def gemma3(periods: int = 1) -> PreTrainedModel:
    """head_dim 256, two sliding layers and a full one, query and key norms."""
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"] * periods
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}
    return _build("Gemma3", **shape, num_hidden_layers=3 * periods, layer_types=layer_types, sliding_window=WINDOW)


def gemma3n() -> PreTrainedModel:
    """Scale 1; the last layers reuse the keys of earlier ones."""
    layer_types = ["sliding_attention", "full_attention"] * 3
    shape = {"num_hidden_layers": 6, "layer_types": layer_types, "sliding_window": WINDOW, "num_kv_shared_layers": 2}
    per_layer = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16, "laurel_rank": 8}
    return _build("Gemma3n", head_dim=16, **shape, **per_layer, altup_num_inputs=2)


def gemma4(head_dim: int = 16, global_head_dim: int = 32) -> PreTrainedModel:
    """The last layers reuse earlier keys and see only a prompt's last query; full layers have wider heads."""
    pytest.importorskip("transformers.models.gemma4", reason="this Transformers has no Gemma 4")
    layer_types = ["sliding_attention", "full_attention"] * 3
    heads = {"head_dim": head_dim, "global_head_dim": global_head_dim, "num_kv_shared_layers": 2}
    heads |= {"num_global_key_value_heads": 1, "attention_k_eq_v": True}
    per_layer = {"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16}
    shape = {"num_hidden_layers": 6, "layer_types": layer_types, "sliding_window": WINDOW}
    return _build("Gemma4", **heads, **per_layer, **shape)


def phi3() -> PreTrainedModel:
    """Queries, keys and values are slices of one fused projection."""
    return _build("Phi3", sliding_window=None)


def minicpm3() -> PreTrainedModel:
    """Multi-head latent attention: the query/key dimension (24) is not the value dimension (16)."""
    pytest.importorskip("transformers.models.minicpm3", reason="this Transformers has no MiniCPM3")
    latent = {"q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    return _build("MiniCPM3", num_key_value_heads=4, scale_emb=2, dim_model_base=32, **latent)


def minicpm() -> PreTrainedModel:
    """The model that `load_minicpm` makes from a checkpoint of MiniCPM 1, 2, 4 or 4.1, here with LongRoPE."""
    factors = [1 + 0.1 * i for i in range(8)]
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": [2 * factor for factor in factors]}
    config = {
        **COMMON,
        **{"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "eos_token_id": 2},
        **{"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
        "rope_scaling": {**rope, "original_max_position_embeddings": 64},
    }
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(llama().state_dict(), Path(folder) / "model.safetensors")
        model = load_minicpm(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


def granite() -> PreTrainedModel:
    """An attention scale that is not head_dim ** -0.5."""
    multipliers = {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.6}
    return _build("Granite", **multipliers, logits_scaling=2.0)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "phi3": phi3,
    "minicpm3": minicpm3,
    "granite": granite,
}


def gpt_oss() -> PreTrainedModel:
    """Attention sinks (an extra softmax column per head), windows on every other layer, eager by default."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    positions = {"max_position_embeddings": 131072}  # what its default YaRN scaling expects
    model = _build("GptOss", num_hidden_layers=4, head_dim=16, sliding_window=WINDOW, **experts, **positions)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=1.0)
    return model


def vlm(periods: int = 1) -> PreTrainedModel:
    """Gemma 3 with its vision tower: image tokens see each other in both directions."""
    text = {**COMMON, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": WINDOW}
    text["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"] * periods
    text["num_hidden_layers"] = 3 * periods
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**_VISION, "image_size": 56, "patch_size": 14},
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_index=IMAGE_TOKEN,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 3,
    )
    model = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros as built: no image
    return model


_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_VISION |= {"num_attention_heads": 2, "initializer_range": 0.2}


def gemma4_vlm() -> PreTrainedModel:
    """Gemma 4 with its vision tower: image tokens see each other in both directions, but only in sliding layers."""
    torch.manual_seed(0)
    vision = {**_VISION, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "pooling_kernel_size": 2}
    config = transformers.Gemma4Config(
        text_config={**gemma4().config.to_dict(), "use_bidirectional_attention": "vision"},
        vision_config={**vision, "position_embedding_size": 16},
        audio_config=None,
        **{"boi_token_id": VOCAB - 2, "eoi_token_id": VOCAB - 3, "image_token_id": IMAGE_TOKEN},
        **{"video_token_id": VOCAB - 4, "audio_token_id": VOCAB - 5, "boa_token_id": VOCAB - 6},
        **{"tie_word_embeddings": False, "initializer_range": 0.2},
    )
    return transformers.Gemma4ForConditionalGeneration(config).float().eval()


def qwen2_5_vl() -> PreTrainedModel:
    """Images between text, causal like all other tokens; positions have three dimensions."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {**_VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4, "window_size": 16}
    del vision["num_hidden_layers"], vision["num_attention_heads"]
    config = transformers.Qwen2_5_VLConfig(
        text_config={**COMMON, "rope_parameters": rope},
        vision_config={**vision, "fullatt_block_indexes": [1]},
        **{"image_token_id": IMAGE_TOKEN, "video_token_id": VOCAB - 4},
        **{"vision_start_token_id": VOCAB - 2, "vision_end_token_id": VOCAB - 3},
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).float().eval()


def qwen3_vl() -> PreTrainedModel:
    """The same with Qwen3's text tower, whose first layers add outputs of the image tower's layers."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {**COMMON, "head_dim": 16, "rope_parameters": rope}
    return _qwen_vl("Qwen3VL", text, deepstack_visual_indexes=[0])


def qwen3_5_vl() -> PreTrainedModel:
    """The same with Qwen3.5's text tower."""
    return _qwen_vl("Qwen3_5", qwen3_5().config.to_dict())


def _qwen_vl(name: str, text: dict[str, Any], **vision: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"depth": 2, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4, "num_position_embeddings": 64}
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config={"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.2, **shape, **vision},
        **{"image_token_id": IMAGE_TOKEN, "video_token_id": VOCAB - 4},
        **{"vision_start_token_id": VOCAB - 2, "vision_end_token_id": VOCAB - 3},
    )
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).float().eval()


def mllama() -> PreTrainedModel:
    """Llama 3.2 Vision: the image is read through cross-attention layers."""
    torch.manual_seed(0)
    vision = {**_VISION, "attention_heads": 2, "num_global_layers": 1, "image_size": 28, "patch_size": 14}
    del vision["num_attention_heads"]
    config = transformers.MllamaConfig(
        text_config={**COMMON, "num_hidden_layers": 5, "cross_attention_layers": [1, 3]},
        vision_config={**vision, "vision_output_dim": 64, "intermediate_layers_indices": [0]},
        image_token_index=IMAGE_TOKEN,
    )
    model = transformers.MllamaForConditionalGeneration(config).float().eval()
    for name, parameter in model.named_parameters():
        if "gate" in name and "gate_proj" not in name:
            torch.nn.init.constant_(parameter, 0.5)  # zeros as built: no image
    return model


def image_inputs(model: PreTrainedModel, length: int) -> dict[str, torch.Tensor]:
    """A prompt with one image, for any of the vision-language models above."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB - 8, (1, length), generator=generator)
    kind = model.config.model_type
    if kind == "mllama":
        ids[:, 14] = IMAGE_TOKEN
        seen = (torch.arange(length) >= 14).long()[None, :, None, None] * torch.tensor([1, 0, 0, 0])
        pixels = torch.randn(1, 1, 4, 3, 28, 28, generator=generator)
        ratios = {"aspect_ratio_ids": torch.tensor([[1]]), "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]])}
        return {"input_ids": ids, "pixel_values": pixels, "cross_attention_mask": seen, **ratios}
    ids[:, 14 : 14 + IMAGE_TOKENS] = IMAGE_TOKEN
    is_image = (ids == IMAGE_TOKEN).long()
    if kind == "gemma3":
        pixels = torch.randn(1, 3, 56, 56, generator=generator)
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": is_image}
    inputs = {"input_ids": ids, "mm_token_type_ids": is_image}
    side = 8  # patches; IMAGE_TOKENS squares of four
    if kind == "gemma4":
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1)
        pixels = torch.rand(1, side * side, 3 * 4 * 4, generator=generator)
        return {**inputs, "pixel_values": pixels, "image_position_ids": places.reshape(1, -1, 2)}
    ids[:, 13] = VOCAB - 2  # where an image begins
    pixels = torch.randn(side * side, 3 * 2 * 4 * 4, generator=generator)
    return {**inputs, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]])}
