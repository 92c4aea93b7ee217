"""The model that `bench model` times: random weights of known sizes, or a checkpoint."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_patch.bench.common import Architecture
from sparse_patch.errors import TaskError
from sparse_patch.model_shape import ModelShape
from sparse_patch.models.loading import load_weights, model_name, native_config


@dataclass(frozen=True)
class RandomWeights:
    """A model of known sizes with random weights, which take as long as trained ones."""

    architecture: Architecture

    @property
    def shape(self) -> ModelShape:
        """The model shape that methods resolve their settings with."""
        return self.architecture.model_shape

    @property
    def about(self) -> dict[str, Any]:
        """What the JSON says about the model."""
        return {"weights": "random", "shape": asdict(self.architecture)}

    def load(self, dtype: torch.dtype, device: str, context: int) -> PreTrainedModel:
        """Make the model, in evaluation mode.

        Args:
            dtype: dtype of the weights.
            device: "cuda" or "cpu".
            context: the most tokens of prompt and answer.

        Raises:
            TaskError: the weights do not fit the device.
        """
        torch.manual_seed(0)
        sizes, heads = self.architecture, self.architecture.heads
        config = AutoConfig.for_model(
            sizes.model_type,
            num_hidden_layers=sizes.layers,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            vocab_size=sizes.vocabulary,
            num_attention_heads=heads.heads,
            num_key_value_heads=heads.kv_heads,
            head_dim=heads.head_dim,
            max_position_embeddings=context,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        )
        try:
            with torch.device(device):
                return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        except torch.OutOfMemoryError:
            raise TaskError("--shape: the weights do not fit the GPU's memory; ask for fewer --layers") from None


@dataclass(frozen=True)
class SavedWeights:
    """The model of a folder or a hub id."""

    path: str

    @cached_property
    def shape(self) -> ModelShape:
        """The model shape that methods resolve their settings with.

        Raises:
            SparsePatchError: the folder or id has no config that can be read.
        """
        text = native_config(self.path).get_text_config(decoder=True)
        return ModelShape.of(text, int(text.num_hidden_layers))

    @property
    def about(self) -> dict[str, Any]:
        """What the JSON says about the model: the last part of the path, and the sizes."""
        heads = {"heads": self.shape.num_heads, "kv_heads": self.shape.num_kv_heads}
        sizes = {"layers": self.shape.num_layers, "hidden": self.shape.hidden_size, "heads": heads}
        return {"weights": model_name(self.path), "shape": {"model_type": self.shape.model_type, **sizes}}

    def load(self, dtype: torch.dtype, device: str, context: int) -> PreTrainedModel:
        """Load the model, in evaluation mode; its context is its own.

        Raises:
            SparsePatchError: the model cannot be loaded.
        """
        return load_weights(self.path, dtype)


Weights = RandomWeights | SavedWeights
