"""MiniCPM's forward pass in plain PyTorch, float32, written from the description of the architecture.

A Llama whose embeddings are multiplied by scale_emb, whose residual branches by scale_depth / sqrt(layers), and whose
last hidden state is divided by hidden_size / dim_model_base before the head. It works on the checkpoint's own config (a
dict) and weights (by name), and shares no code with Transformers.
"""

from __future__ import annotations

import math
from typing import Any

import torch

Config = dict[str, Any]
Weights = dict[str, torch.Tensor]
Cache = list[tuple[torch.Tensor, torch.Tensor]]  # rotated keys and values [kv heads, length, head_dim] of each layer


def logits_of(
    config: Config, weights: Weights, ids: torch.Tensor, cache: Cache | None = None, batch_length: int = 0
) -> torch.Tensor:
    """Logits `[length, vocabulary]` of one row of token ids `[length]` that follow the content of the cache.

    The cache is an empty list at first; it is filled and grows from call to call. `batch_length` is the length
    of the longest row of the batch, with which this row shares the choice of RoPE factors.
    """
    start = cache[0][0].shape[1] if cache else 0
    end = start + len(ids)
    cos, sin = rotation(config, torch.arange(start, end), max(end, batch_length))
    depth = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    hidden = weights["model.embed_tokens.weight"][ids] * config["scale_emb"]
    for layer in range(config["num_hidden_layers"]):
        here = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{layer}.")}
        past = cache[layer] if cache is not None and layer < len(cache) else None
        out, keys_values = attention(config, here, norm(config, hidden, here["input_layernorm.weight"]), cos, sin, past)
        if cache is not None:
            cache[layer : layer + 1] = [keys_values]
        hidden = hidden + out * depth
        x = norm(config, hidden, here["post_attention_layernorm.weight"])
        gate, up = x @ here["mlp.gate_proj.weight"].T, x @ here["mlp.up_proj.weight"].T
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ here["mlp.down_proj.weight"].T * depth
    hidden = norm(config, hidden, weights["model.norm.weight"]) / (config["hidden_size"] / config["dim_model_base"])
    return hidden @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def attention(
    config: Config,
    weights: Weights,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Causal attention `[length, hidden]`, head by head, and the keys and values after those of the past."""

    def heads(name: str, count: int) -> torch.Tensor:
        out = x @ weights[f"self_attn.{name}_proj.weight"].T + weights.get(f"self_attn.{name}_proj.bias", 0)
        return out.view(len(x), count, -1).transpose(0, 1)

    query_heads, kv_heads = (
        config["num_attention_heads"],
        config.get("num_key_value_heads") or config["num_attention_heads"],
    )
    q, k, v = rotate(heads("q", query_heads), cos, sin), rotate(heads("k", kv_heads), cos, sin), heads("v", kv_heads)
    if past is not None:
        k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    visible = torch.ones(len(x), k.shape[1]).tril(k.shape[1] - len(x)).bool()
    outputs = []
    for head in range(query_heads):
        of = head // (query_heads // kv_heads)
        scores = (q[head] @ k[of].T / math.sqrt(q.shape[-1])).masked_fill(~visible, -math.inf)
        outputs.append(torch.softmax(scores, -1) @ v[of])
    out = torch.cat(outputs, -1) @ weights["self_attn.o_proj.weight"].T + weights.get("self_attn.o_proj.bias", 0)
    return out, (k, v)


def rotation(config: Config, positions: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[positions, head_dim]` for a text of this length."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    longest = config["max_position_embeddings"]
    scaling, base = config.get("rope_scaling") or {}, config.get("rope_theta", 10000.0)
    kind = scaling.get("rope_type", scaling.get("type"))
    divisor, magnitude = torch.ones(dim // 2), 1.0
    if kind == "linear":
        divisor = divisor * scaling["factor"]
    elif kind == "dynamic":
        grown = scaling["factor"] * max(length, longest) / longest - (scaling["factor"] - 1)
        base = base * grown ** (dim / (dim - 2))
    elif kind == "longrope":
        original = scaling["original_max_position_embeddings"]
        divisor = torch.tensor(scaling["long_factor" if length > original else "short_factor"])
        magnitude = math.sqrt(1 + math.log(longest / original) / math.log(original))
    frequencies = base ** (-torch.arange(0, dim, 2).float() / dim) / divisor
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def norm(config: Config, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]) * weight
