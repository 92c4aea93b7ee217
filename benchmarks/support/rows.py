"""The rows of the table: families, with a tiny model for each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import families
import torch
from transformers import PreTrainedModel

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        models: names of the models that the family stands for.
        build: makes a tiny random model of their architecture.
        inputs: makes the model's inputs; None for tokens.
    """

    models: str
    build: Callable[[], PreTrainedModel]
    inputs: Callable[[PreTrainedModel, int], Inputs] | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 2, 3, 3.1, 3.2, 3.3", families.llama),
    "llama4": Family("Llama 4", families.llama4),
    "mistral": Family("Mistral 0.1 (sliding window)", families.mistral),
    "mistral_full": Family("Mistral 0.2 and later", families.mistral_full),
    "qwen2": Family("Qwen2, Qwen2.5", families.qwen2),
    "qwen3": Family("Qwen3", families.qwen3),
    "qwen3_moe": Family("Qwen3-MoE", families.qwen3_moe),
    "qwen3_next": Family("Qwen3-Next", families.qwen3_next),
    "qwen3_5": Family("Qwen3.5", families.qwen3_5),
    "gemma": Family("Gemma 1 (head_dim 256)", families.gemma),
    "gemma2": Family("Gemma 2 (softcap 50)", families.gemma2),
    "gemma3": Family("Gemma 3 (head_dim 256)", partial(families.gemma3, periods=2)),
    "gemma3n": Family("Gemma 3n (scale 1)", families.gemma3n),
    "gemma4": Family("Gemma 4 (scale 1, head_dim 256 and 512)", partial(families.gemma4, 256, 512)),
    "minicpm": Family("MiniCPM 1, 2, 4, 4.1, by `load_minicpm`", families.minicpm),
    "minicpm3": Family("MiniCPM3 (MLA)", families.minicpm3),
    "phi3": Family("Phi-3, Phi-4-mini", families.phi3),
    "granite": Family("Granite 3", families.granite),
    "gpt_oss": Family("gpt-oss", families.gpt_oss),
    "mllama": Family("Llama 3.2 Vision, with an image", families.mllama, families.image_inputs),
    "qwen2_5_vl": Family("Qwen2.5-VL, with an image", families.qwen2_5_vl, families.image_inputs),
    "qwen3_vl": Family("Qwen3-VL, with an image", families.qwen3_vl, families.image_inputs),
    "qwen3_5_vl": Family("Qwen3.5, with an image", families.qwen3_5_vl, families.image_inputs),
    "gemma3_vlm": Family("Gemma 3, with an image", partial(families.vlm, periods=2), families.image_inputs),
    "gemma4_vlm": Family("Gemma 4, with an image", families.gemma4_vlm, families.image_inputs),
}
