"""Checkpoints in MiniCPM's own format, with random weights, and the reference's logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from oracles import minicpm as oracle
from safetensors.torch import save_file
from torch import nn

VOCAB = 96
ORIGINAL = 32  # the length beyond which LongRoPE takes its long factors
EXACT = {"atol": 1e-5, "rtol": 0.0}  # of logits of size 1, in float32
CONFIG: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"],
    "model_type": "minicpm",
    "auto_map": {
        "AutoConfig": "configuration_minicpm.MiniCPMConfig",
        "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
    },
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 16,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "bfloat16",
}


def longrope(dim: int = 16, **changes: Any) -> dict[str, Any]:
    short, long = ([1 + step * i for i in range(dim // 2)] for step in (0.1, 0.7))
    factors = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": ORIGINAL}
    return {"rope_type": "longrope", **factors, **changes}


def random_weights(config: dict[str, Any]) -> oracle.Weights:
    """Large enough that a wrong position or a lost constant moves the logits; norms and biases are no identities."""
    generator = torch.Generator().manual_seed(5)
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * dim, (config["num_key_value_heads"] or config["num_attention_heads"]) * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (VOCAB, hidden)
    for layer in range(layers):
        block = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        named = {f"self_attn.{name}.weight": shape for name, shape in block.items()}
        if config.get("attention_bias"):
            named |= {f"self_attn.{name}.bias": shape[:1] for name, shape in block.items()}
        named |= {f"mlp.{name}.weight": shape for name, shape in mlp.items()}
        named |= {f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in named.items()}
    weights = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    return {name: weight + 1 if "norm" in name else weight for name, weight in weights.items()}


def write(
    folder: Path, weights: oracle.Weights | None = None, file: str = "model.safetensors", **changes: Any
) -> tuple[dict[str, Any], oracle.Weights]:
    """A checkpoint; its config without the fields that are changed to `...`, and its weights."""
    config = {name: value for name, value in {**CONFIG, **changes}.items() if value is not ...}
    weights = random_weights({**CONFIG, **config}) if weights is None else weights
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save: Callable[[Any, Path], Any] = save_file if file.endswith("safetensors") else torch.save
    save(weights, folder / file)
    return config, weights


def write_in_parts(folder: Path, file: str) -> tuple[dict[str, Any], oracle.Weights]:
    config, weights = write(folder, file=file)
    (folder / file).unlink()
    pattern = file.replace(".", "{suffix}.")
    parts = split_torch_state_dict_into_shards(weights, filename_pattern=pattern, max_shard_size=60_000)
    assert len(parts.filename_to_tensors) > 3
    for name, tensors in parts.filename_to_tensors.items():
        part = {tensor: weights[tensor] for tensor in tensors}
        save_file(part, folder / name) if name.endswith("safetensors") else torch.save(part, folder / name)
    index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
    (folder / f"{file}.index.json").write_text(json.dumps(index))
    return config, weights


def tokens(length: int, seed: int = 7) -> torch.Tensor:
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return model(ids if ids.dim() == 2 else ids[None], **inputs).logits


def assert_is_the_reference(model: nn.Module, config: dict[str, Any], weights: oracle.Weights) -> None:
    for length in (5, ORIGINAL, ORIGINAL + 1, 90):
        want = oracle.logits_of(config, weights, tokens(length))
        assert want.std() > 0.3
        torch.testing.assert_close(logits(model, tokens(length))[0], want, **EXACT)
