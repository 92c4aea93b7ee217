"""Run a model on a prompt, with prefill and decode timed separately."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from sparse_patch.integration.caches.making import growing_cache
from sparse_patch.integration.generation_cache import span_cache
from sparse_patch.workbench.machine import synchronize


@dataclass(frozen=True)
class Prefilled:
    """The state after a prompt was read.

    Attributes:
        logits: the logits of its last token or tokens, `[tokens, vocabulary]`.
        cache: its keys and values.
        seconds: the time it took.
    """

    logits: torch.Tensor
    cache: DynamicCache
    seconds: float


def prefill(model: PreTrainedModel, tokens: Sequence[int], answer: int | None = None, keep: int = 1) -> Prefilled:
    """Read a prompt in one forward.

    Args:
        model: the model, patched or not.
        tokens: the prompt.
        answer: number of tokens that may follow, for a cache as `generate` makes it; None for a cache that keeps all
            keys.
        keep: number of tokens at the end whose logits are wanted.
    """
    cache = growing_cache(model.config) if answer is None else span_cache(model, len(tokens) + answer)
    synchronize()
    start = time.perf_counter()
    logits = forward(model, tokens, cache, keep)
    synchronize()
    return Prefilled(logits, cache, time.perf_counter() - start)


@torch.no_grad()
def forward(model: PreTrainedModel, tokens: Sequence[int], cache: DynamicCache, keep: int = 1) -> torch.Tensor:
    """Feed tokens that follow the cached ones, and return the logits of the last ones, `[keep, vocabulary]`."""
    ids = torch.tensor([tokens], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, logits_to_keep=keep).logits
    return logits[0]


@dataclass(frozen=True)
class Forced:
    """A model's predictions at each token of an expected answer, which is fed regardless of what it predicts.

    Attributes:
        predicted: the most probable token at the position of each expected token.
        right: whether each expected token was the most probable one.
        seconds: time of the decode steps, of which there is one fewer than tokens.
        detour: at the first wrong prediction: the tokens up to and including it, and a copy of the cache from
            before it. None if all predictions were right, or if no copy was asked for.
        logits: the logits of each prediction, `[tokens, vocabulary]`; None if they were not asked for.
    """

    predicted: list[int]
    right: list[bool]
    seconds: float
    detour: tuple[list[int], DynamicCache] | None
    logits: torch.Tensor | None = None


def force(
    model: PreTrainedModel, start: Prefilled, expected: Sequence[int], fork: bool = False, keep: bool = False
) -> Forced:
    """Feed an expected answer one token at a time, as generation would, and record what the model predicts.

    With `fork` the cache is copied at the first wrong prediction, so that generation can continue from there. With
    `keep` the logits are kept.
    """
    predicted: list[int] = []
    kept: list[torch.Tensor] = []
    seconds, detour, logits = 0.0, None, start.logits[-1]
    for number, token in enumerate(expected):
        predicted.append(int(logits.argmax()))
        kept += [logits] if keep else []
        if predicted[-1] != token and fork and detour is None:
            detour = ([*expected[:number], predicted[-1]], copy.deepcopy(start.cache))
        if number + 1 < len(expected):
            begin = time.perf_counter()
            logits = forward(model, [token], start.cache)[-1]
            synchronize()
            seconds += time.perf_counter() - begin
    right = [guess == token for guess, token in zip(predicted, expected, strict=True)]
    return Forced(predicted, right, seconds, detour, torch.stack(kept) if keep else None)


def continue_greedily(
    model: PreTrainedModel, tokens: Sequence[int], cache: DynamicCache, max_new_tokens: int, stop: Sequence[int]
) -> list[int]:
    """Generate after `tokens`, whose last one is not cached yet, until there are `max_new_tokens` in all."""
    generated = list(tokens)
    while len(generated) < max_new_tokens and generated[-1] not in stop:
        generated.append(int(forward(model, generated[-1:], cache).argmax()))
    return generated


def encode(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Encode a prompt and its answer as one text; the answer by itself if a token would span both."""
    before: list[int] = tokenizer(prompt, verbose=False)["input_ids"]
    both: list[int] = tokenizer(prompt + answer, verbose=False)["input_ids"]
    if both[: len(before)] == before and len(both) > len(before):
        return before, both[len(before) :]
    alone: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return before, alone


def stop_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The tokens that end a text, from the tokenizer and from the model's generation settings."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    known = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return [token for token in known if token is not None]
