"""Running a model on a prompt: prefill and decode apart, each timed."""

import copy
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedConfig, PreTrainedModel

from sparse_patch.caches import growing_cache
from sparse_patch.errors import SparsePatchError, TaskError
from sparse_patch.minicpm import is_minicpm, load_minicpm
from sparse_patch.patching import span_cache


def load_model(path: str | Path) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer from a local folder or a hub id: float32 on a CPU, bfloat16 on a GPU, evaluation mode.

    MiniCPM is loaded as a native model, without the code beside its weights.

    Raises:
        SparsePatchError: they cannot be loaded.
    """
    on_gpu = torch.cuda.is_available()
    tokenizer = load_tokenizer(path)
    load = load_minicpm if is_minicpm(path) else AutoModelForCausalLM.from_pretrained
    try:
        model = load(path, dtype=torch.bfloat16 if on_gpu else torch.float32)
    except (OSError, ValueError) as error:
        raise _cannot_be_loaded("--model", path, error) from None
    model = model.cuda() if on_gpu else model  # type: ignore[call-arg]
    return model.eval(), tokenizer


def load_tokenizer(path: str | Path, option: str = "--model") -> Any:
    """A tokenizer from a local folder or a hub id.

    Raises:
        SparsePatchError: it cannot be loaded; the message begins with the option that named it.
    """
    # without a config Transformers would look for the class of MiniCPM's own, and ask whether to run the code beside it
    config = PreTrainedConfig() if is_minicpm(path) else None
    try:
        return AutoTokenizer.from_pretrained(path, config=config)
    except (OSError, ValueError) as error:
        raise _cannot_be_loaded(option, path, error) from None


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


def _cannot_be_loaded(option: str, path: str | Path, error: Exception) -> SparsePatchError:
    reason = str(error).split("\n")[0]
    return SparsePatchError(f"{option}: {path}: cannot be loaded: {reason}")
