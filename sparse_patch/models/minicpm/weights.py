"""A checkpoint's weights: which files contain them, and whether they fit a model as they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GraniteConfig, GraniteForCausalLM
from transformers.modeling_utils import load_state_dict

from sparse_patch.errors import SparsePatchError, reason
from sparse_patch.files.reading import read_json

LM_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # one file, or parts with an index; in Transformers' order


class Weight(NamedTuple):
    """The file that contains a weight, and the weight's shape."""

    file: Path
    shape: tuple[int, ...]


def weights_in(folder: Path) -> dict[str, Weight]:
    """Names and shapes of the weights. Of a pickle, only tensors are loaded."""
    found: dict[str, Weight] = {}
    for file in _weight_files(folder):
        try:
            tensors = load_state_dict(str(file), map_location="meta", weights_only=True)
            found |= {name: Weight(file, tuple(tensor.shape)) for name, tensor in tensors.items()}
        except Exception as error:  # every format raises its own exception types
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
    except (ValueError, KeyError, TypeError, AttributeError):  # ValueError: it is not JSON
        raise SparsePatchError(f"{index}: expected a weight_map of names and files; download it again") from None
    for file in files:
        if not file.is_file():
            raise SparsePatchError(f"{index}: weight_map: there is no {file.name} beside it; download it again")
    return files


def check_weights(folder: Path, weights: Mapping[str, Weight], config: GraniteConfig) -> None:
    """Raise unless the weights fit a model of this config: none missing, none left over, each with the right shape."""
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in GraniteForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings and LM_HEAD not in weights:
        del expected[LM_HEAD]
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise SparsePatchError(
            f"{folder}: {len(missing)} of {len(expected)} weights are missing, first {missing[0]}; config.json "
            "does not belong to these weights, or a download is not complete"
        )
    for name, (file, shape) in weights.items():
        if name not in expected and not name.endswith("rotary_emb.inv_freq"):  # a table that old checkpoints contain
            raise SparsePatchError(f"{file}: {name}: a dense MiniCPM by config.json has no such weight")
        if shape != expected.get(name, shape):
            raise SparsePatchError(
                f"{file}: {name}: expected the shape {list(expected[name])} by config.json, got {list(shape)}"
            )
    if config.tie_word_embeddings and LM_HEAD in weights:
        head, embeddings = (load_state_dict(str(weights[name].file))[name] for name in (LM_HEAD, _EMBEDDINGS))
        if not torch.equal(head, embeddings):
            raise SparsePatchError(
                f"{folder}/config.json: tie_word_embeddings: true, but {LM_HEAD} is not {_EMBEDDINGS}; set it to false"
            )
