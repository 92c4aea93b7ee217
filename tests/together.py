"""Helpers for several threads that use one model at once."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel


@contextmanager
def eager_switching(seconds: float = 1e-5) -> Iterator[None]:
    """Threads switch as often as the interpreter allows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Start jobs at the same time, one thread each, and return their results; for a job that raised, its exception."""
    results: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = jobs[number]()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    with eager_switching():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


def prompts(lengths: Sequence[int], device: str = "cpu") -> list[dict[str, torch.Tensor]]:
    """One-row prompts; every second one begins with padding."""
    found = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[:, : 11 * (number % 2)] = 0
        found.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return found


def answer(model: PreTrainedModel, prompt: dict[str, torch.Tensor], new: int, **options: Any) -> list[int]:
    """The tokens that a model generates greedily."""
    tokens = model.generate(**prompt, max_new_tokens=new, do_sample=False, **options)  # type: ignore[operator]
    return tokens[0, prompt["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


def wrong_answers(
    model: PreTrainedModel, prompts: Sequence[dict[str, torch.Tensor]], new: int, rounds: int = 1, **options: Any
) -> list[str]:
    """The answers of threads, one per prompt, that differ from those of a single thread; one line per answer."""
    expected = [answer(model, prompt, new, **options) for prompt in prompts]
    wrong = []
    for _ in range(rounds):
        found = at_once([lambda prompt=prompt: answer(model, prompt, new, **options) for prompt in prompts])
        wrong += [f"{one} is not {other}" for one, other in zip(found, expected, strict=True) if one != other]
    return wrong
