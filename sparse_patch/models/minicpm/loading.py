"""Load a native model from a folder or a hub id."""

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedConfig

from sparse_patch.errors import SparsePatchError, reason, short
from sparse_patch.models.minicpm.config import MODEL_TYPE, read_config
from sparse_patch.models.minicpm.weights import LM_HEAD, check_weights, weights_in


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

    The model's `save_pretrained` writes a Granite checkpoint, which `AutoModelForCausalLM` loads. The model's config
    records what was carried over: `config.minicpm` has MiniCPM's constants and the kind of RoPE, and
    `config.sparse_config` has the settings of InfLLM-V2 for the method `infllmv2`, or None. Attention is dense until
    `patch_model`. Embeddings are tied if config.json says so, or if it says nothing and the weights have no lm_head.

    Args:
        path: a folder with config.json and weights (safetensors or pytorch_model.bin, whole or in parts), or a hub id.
        dtype: dtype of the model's weights; "auto" means the dtype in config.json, else that of the stored weights.
        device_map: as in Transformers: "cuda", "auto", ...; by default the CPU.
        attn_implementation: as in Transformers.
        revision: revision of a hub id.

    Raises:
        SparsePatchError: the checkpoint does not exist, or is not a complete, unquantized, dense MiniCPM.
    """
    folder = _folder(path, revision)
    fields = read_config(folder)
    weights = weights_in(folder)
    tied = LM_HEAD not in weights if fields.tie_word_embeddings is None else fields.tie_word_embeddings
    config = fields.granite(tied)
    check_weights(folder, weights, config)
    return GraniteForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        device_map=device_map,
        attn_implementation=attn_implementation,
        trust_remote_code=False,
    )


def is_minicpm(path: str | Path) -> bool:
    """Whether a folder or hub id has a config.json of MiniCPM, so that `load_minicpm` must load it."""
    try:
        data, _ = PreTrainedConfig.get_config_dict(path)
        return data.get("model_type") == MODEL_TYPE
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):  # the file is missing or not a JSON object
        return False


def minicpm_config(path: str | Path) -> GraniteConfig:
    """The config of the model that `load_minicpm` would give, without its weights.

    Raises:
        SparsePatchError: there is no config, or it is not the config of a dense MiniCPM.
    """
    fields = read_config(path)
    return fields.granite(tied=fields.tie_word_embeddings is not False)


def _folder(path: str | Path, revision: str | None) -> Path:
    """The checkpoint's folder, downloaded if `path` is a hub id. No code is downloaded."""
    if not isinstance(path, str | os.PathLike):
        raise SparsePatchError(f"load_minicpm: path: expected a folder or a hub id, got {short(path)}")
    if Path(path).is_dir():
        return Path(path)
    try:
        folder = Path(snapshot_download(str(path), revision=revision, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):  # pickled weights are often there too: download them only if needed
            snapshot_download(str(path), revision=revision, allow_patterns=["*.json", "*.bin"])
    except (OSError, ValueError) as error:
        raise SparsePatchError(f"{path}: no such folder, and not available from the hub: {reason(error)}") from None
    return folder
