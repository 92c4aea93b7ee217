"""Running a model on a prompt: prefill and decode apart, each timed."""

import copy
import json
import pickle
import platform
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedConfig, PreTrainedModel

from sparse_patch.caches import growing_cache
from sparse_patch.errors import SparsePatchError, TaskError, one_line
from sparse_patch.minicpm import is_minicpm, load_minicpm
from sparse_patch.patching import span_cache

_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")  # files that a tokenizer is made of


def load_model(path: str | Path) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer from a local folder or a hub id: float32 on a CPU, bfloat16 on a GPU, evaluation mode.

    MiniCPM is loaded as a native model, without the code beside its weights.

    Raises:
        SparsePatchError: they cannot be loaded.
    """
    check_config("--model", path)
    on_gpu = torch.cuda.is_available()
    tokenizer = load_tokenizer(path)
    load = load_minicpm if is_minicpm(path) else partial(AutoModelForCausalLM.from_pretrained, weights_only=True)
    with loading("--model", path):
        model = load(path, dtype=torch.bfloat16 if on_gpu else torch.float32)
        model = model.cuda() if on_gpu else model  # type: ignore[call-arg]
    return model.eval(), tokenizer


def load_tokenizer(path: str | Path, option: str = "--model") -> Any:
    """A tokenizer from a local folder or a hub id.

    Raises:
        SparsePatchError: it cannot be loaded; the message begins with the option that named it.
    """
    _check_folder(option, path, _TOKENIZERS, "tokenizer; put it there with `tokenizer.save_pretrained(folder)`")
    # without a config Transformers would look for the class of MiniCPM's own, and ask whether to run the code beside it
    config = PreTrainedConfig() if is_minicpm(path) else None
    with loading(option, path, "tokenizer: "):
        return AutoTokenizer.from_pretrained(path, config=config)


@contextmanager
def loading(option: str, path: str | Path, part: str = "") -> Iterator[None]:
    """For a `with` block that loads what a folder or a hub id holds: whatever fails there is one line.

    Transformers, tokenizers and safetensors each raise what they like for a file that is damaged.

    Raises:
        SparsePatchError: it cannot be loaded; the message begins with the option that named it.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error that follows says it better
            yield
    except SparsePatchError:
        raise
    except Exception as error:
        part = part if Path(path).is_dir() else ""
        raise SparsePatchError(
            f"{option}: {one_line(path)}: cannot be loaded: {part}{_reason(Path(path), error)}"
        ) from error


def _reason(path: Path, error: Exception) -> str:
    """Why nothing could be loaded, in our words where they are clearer."""
    text = one_line(" ".join(str(error).split()), 240)
    if isinstance(error, pickle.UnpicklingError):
        return "its weights are a pickle of more than tensors, which is never opened; save them as safetensors"
    if not path.exists():
        return f"no such folder; as a hub id: {text}"
    if not path.is_dir():
        return "it is not a folder; name that of a checkpoint"
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"


def _check_folder(option: str, path: str | Path, needed: Sequence[str], what: str) -> None:
    """Raise if there is such a folder and it has none of the files that are needed; a hub id passes."""
    if Path(path).is_dir() and not any(any(Path(path).glob(pattern)) for pattern in needed):
        raise SparsePatchError(f"{option}: {one_line(path)}: cannot be loaded: has no {what}")


def check_config(option: str, path: str | Path) -> None:
    """Raise if a folder has no config.json, or one that is no JSON object; a hub id passes.

    Raises:
        SparsePatchError: see above.
    """
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
    """Raise TaskError if a prompt and its answer do not fit the positions that the model was made for."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length + answer > context:
        raise TaskError(
            f"{option}: a prompt of {length} tokens and {answer} for the answer do not fit the model's context of "
            f"{context}; ask for at most {context - answer}"
        )


@dataclass(frozen=True)
class Prefilled:
    """A model that has read a prompt: the logits of its last token, the cache, and the seconds that it took."""

    logits: torch.Tensor
    cache: DynamicCache
    seconds: float


def prefill(model: PreTrainedModel, tokens: Sequence[int], answer: int | None = None) -> Prefilled:
    """Read a prompt in one forward.

    Args:
        model: the model, patched or not.
        tokens: the prompt.
        answer: tokens that may follow, for a cache as `generate` makes it; None for one that keeps everything.
    """
    cache = growing_cache(model.config) if answer is None else span_cache(model, len(tokens) + answer)
    synchronize()
    start = time.perf_counter()
    logits = forward(model, tokens, cache)
    synchronize()
    return Prefilled(logits, cache, time.perf_counter() - start)


@torch.no_grad()
def forward(model: PreTrainedModel, tokens: Sequence[int], cache: DynamicCache) -> torch.Tensor:
    """Feed tokens after what the cache holds; the logits of the last one, `[vocabulary]`."""
    ids = torch.tensor([tokens], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
    return logits[0, -1]


@dataclass(frozen=True)
class Forced:
    """What a model predicted at each token of an expected answer, fed token by token whatever it predicted.

    Attributes:
        predicted: the most probable token where each expected one stands.
        right: for each expected token, whether it was the most probable one.
        seconds: time of the decode steps, of which there is one less than tokens.
        detour: where the first prediction was wrong: the tokens up to and with the wrong one, and a copy of the cache
            from before it. None if all were right, or if no copy was asked for.
    """

    predicted: list[int]
    right: list[bool]
    seconds: float
    detour: tuple[list[int], DynamicCache] | None


def force(model: PreTrainedModel, start: Prefilled, expected: Sequence[int], fork: bool = False) -> Forced:
    """Feed an expected answer one token at a time, as generation would, and note what the model predicts.

    With `fork` the cache is copied where the first prediction is wrong, so that generation can go on from there.
    """
    predicted: list[int] = []
    seconds, detour, logits = 0.0, None, start.logits
    for number, token in enumerate(expected):
        predicted.append(int(logits.argmax()))
        if predicted[-1] != token and fork and detour is None:
            detour = ([*expected[:number], predicted[-1]], copy.deepcopy(start.cache))
        if number + 1 < len(expected):
            begin = time.perf_counter()
            logits = forward(model, [token], start.cache)
            synchronize()
            seconds += time.perf_counter() - begin
    right = [guess == token for guess, token in zip(predicted, expected, strict=True)]
    return Forced(predicted, right, seconds, detour)


def continue_greedily(
    model: PreTrainedModel, tokens: Sequence[int], cache: DynamicCache, max_new_tokens: int, stop: Sequence[int]
) -> list[int]:
    """Generate after the last of `tokens`, which the cache does not hold yet, until there are `max_new_tokens`."""
    generated = list(tokens)
    while len(generated) < max_new_tokens and generated[-1] not in stop:
        generated.append(int(forward(model, generated[-1:], cache).argmax()))
    return generated


def encode(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and those of its answer as they follow it; on its own where both merge into one token."""
    before: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    both: list[int] = tokenizer(prompt + answer, verbose=False)["input_ids"]
    if both[: len(before)] == before and len(both) > len(before):
        return before, both[len(before) :]
    alone: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return before, alone


def stop_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end a text, by the tokenizer and by the model's generation settings."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    known = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return [token for token in known if token is not None]


def synchronize() -> None:
    """Wait for the GPU, so that a clock measures what ran."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """What a measurement ran on."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
