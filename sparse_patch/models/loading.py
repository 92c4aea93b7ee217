"""Load the model and tokenizer of any checkpoint; every failure is reported in one line."""

import json
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from sparse_patch.errors import SparsePatchError, TaskError, one_line
from sparse_patch.models.gguf import check_gguf, gguf_file, splitting
from sparse_patch.models.loaders import loader_of

_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")  # files of a tokenizer


def load_model(path: str | Path) -> tuple[PreTrainedModel, Any]:
    """Load model and tokenizer: float32 on a CPU, bfloat16 on a GPU, in evaluation mode.

    A path is that of a folder or of a GGUF file, or a hub id. A folder may have a GGUF file in place of a checkpoint. A
    checkpoint with a loader of its own (MiniCPM) is loaded as a native model; the code that comes with it never runs.

    Raises:
        SparsePatchError: the model or its tokenizer cannot be loaded.
    """
    check_config("--model", path)
    tokenizer = load_tokenizer(path)
    return load_weights(path, torch.bfloat16 if torch.cuda.is_available() else torch.float32), tokenizer


def load_weights(path: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a model without its tokenizer, as `load_model` does, in a dtype; on the GPU if there is one.

    Raises:
        SparsePatchError: the model cannot be loaded.
    """
    check_config("--model", path)
    own = loader_of(path)
    load = own.load if own else partial(AutoModelForCausalLM.from_pretrained, weights_only=True)
    place, extra = _source(path, "--model")
    with loading("--model", path):
        model = load(place, dtype=dtype, **extra)
        model = model.cuda() if torch.cuda.is_available() else model  # type: ignore[call-arg]
    return model.eval()


def native_config(path: str | Path) -> PreTrainedConfig:
    """The config of a checkpoint, without its weights; that of the native model if the checkpoint has a loader here.

    Raises:
        SparsePatchError: there is no config, or it cannot be read.
    """
    check_config("--model", path)
    place, extra = _source(path, "--model")
    with loading("--model", path):
        own = loader_of(path)
        config: PreTrainedConfig = own.config(path) if own else AutoConfig.from_pretrained(place, **extra)
    return config


def load_tokenizer(path: str | Path, option: str = "--model") -> Any:
    """Load a tokenizer from a local folder, a GGUF file or a hub id.

    Raises:
        SparsePatchError: it cannot be loaded. The message begins with the option that named it.
    """
    if file := gguf_file(path, option):
        check_gguf(file, option)
        rule = splitting(file, option)
        with loading(option, path, "tokenizer: "):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            if rule is not None:
                tokenizer.backend_tokenizer.pre_tokenizer = rule
            return tokenizer
    _check_folder(option, path, _TOKENIZERS, "tokenizer; put it there with `tokenizer.save_pretrained(folder)`")
    # Without a config, Transformers would look for the checkpoint's own class and ask whether to run its code.
    config = PreTrainedConfig() if loader_of(path) else None
    with loading(option, path, "tokenizer: "):
        return AutoTokenizer.from_pretrained(path, config=config)


def model_name(path: str | Path) -> str:
    """A model's name for results: that of its folder or GGUF file, or its hub id."""
    return Path(gguf_file(path) or path).resolve().name if Path(path).exists() else str(path)


def _source(path: str | Path, option: str) -> tuple[str | Path, dict[str, str]]:
    """What `from_pretrained` is to load: a folder or hub id, and the name of the GGUF file in it if there is one."""
    file = gguf_file(path, option)
    return (path, {}) if file is None else (file.parent, {"gguf_file": file.name})


@contextmanager
def loading(option: str, path: str | Path, part: str = "") -> Iterator[None]:
    """For a `with` block that loads from a folder or a hub id: turn every failure into a one-line error.

    Transformers, tokenizers and safetensors raise errors of many types for a damaged file.

    Raises:
        SparsePatchError: loading fails. The message begins with the option that named the folder or id.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error that follows is clearer
            yield
    except SparsePatchError:
        raise
    except Exception as error:
        part = part if Path(path).is_dir() else ""
        raise SparsePatchError(
            f"{option}: {one_line(path)}: cannot be loaded: {part}{_reason(Path(path), error)}"
        ) from error


def _reason(path: Path, error: Exception) -> str:
    """Why loading failed, in our words if they are clearer."""
    text = one_line(" ".join(str(error).split()), 240)
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are a pickle of more than tensors, which is never opened; save them as safetensors"
    if not path.exists():
        return f"no such folder; as a hub id: {text}"
    if not path.is_dir() and path.suffix != ".gguf":
        return "it is not a folder; name that of a checkpoint"
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"


def _check_folder(option: str, path: str | Path, needed: Sequence[str], what: str) -> None:
    """Raise if the folder exists but has none of the needed files. A hub id passes."""
    if Path(path).is_dir() and not any(any(Path(path).glob(pattern)) for pattern in needed):
        raise SparsePatchError(f"{option}: {one_line(path)}: cannot be loaded: has no {what}")


def check_config(option: str, path: str | Path) -> None:
    """Raise if a folder has no config.json, or one that is not a JSON object, nor a GGUF file. A hub id passes.

    Raises:
        SparsePatchError: see above, or the GGUF file is none.
    """
    if gguf := gguf_file(path, option):
        check_gguf(gguf, option)
        return
    _check_folder(option, path, ["config.json"], "config.json; name the folder of a checkpoint")
    file = Path(path) / "config.json"
    if file.is_file():
        try:
            data = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise SparsePatchError(f"{option}: {file}: cannot be read: {error}") from None
        if not isinstance(data, dict):
            raise SparsePatchError(f"{option}: {file}: expected a JSON object, got a {type(data).__name__}")


def check_context(model: PreTrainedModel, length: int, answer: int, option: str) -> None:
    """Raise TaskError if a prompt and its answer do not fit the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length + answer > context:
        raise TaskError(
            f"{option}: a prompt of {length} tokens and {answer} for the answer do not fit the model's context of "
            f"{context}; ask for at most {context - answer}"
        )
