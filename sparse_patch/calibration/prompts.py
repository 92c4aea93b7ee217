"""The prompts that calibrations measure on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sparse_patch.errors import TaskError
from sparse_patch.models.loading import check_context
from sparse_patch.workbench.generation import encode
from sparse_patch.workbench.prompts import read_haystack
from sparse_patch.workbench.tasks import tasks_of


def generated_prompts(
    model: PreTrainedModel, tokenizer: Any, tasks: Sequence[str], lengths: Sequence[int], samples: int, seed: int
) -> list[list[int]]:
    """Make prompts of the offline tasks, in turn, `samples` of each length.

    Raises:
        TaskError: there is no such task, or a prompt does not fit the model's context.
    """
    chosen = tasks_of("all", tasks)
    prompts = []
    for length in lengths:
        check_context(model, length, 0, "--lengths")
        for number in range(samples):
            sample = chosen[number % len(chosen)].sample(tokenizer, length, seed, number)
            prompts.append(encode(tokenizer, sample.prompt, sample.answer)[0])
    return prompts


def text_prompts(
    model: PreTrainedModel, tokenizer: Any, path: Path, lengths: Sequence[int], samples: int
) -> list[list[int]]:
    """Cut a text file into consecutive pieces, `samples` of each length.

    Raises:
        TaskError: the file cannot be read or has too few tokens, or a piece does not fit the model's context.
    """
    tokens: list[int] = tokenizer(read_haystack(path, "--text"), verbose=False)["input_ids"]
    if len(tokens) < sum(lengths) * samples:
        raise TaskError(
            f"--text: {path}: has {len(tokens)} tokens, {samples} pieces of each length need "
            f"{sum(lengths) * samples}; ask for fewer --samples or shorter --lengths"
        )
    prompts, begin = [], 0
    for length in lengths:
        check_context(model, length, 0, "--lengths")
        for _ in range(samples):
            prompts.append(tokens[begin : begin + length])
            begin += length
    return prompts
