"""Long prompts with answers that depend on distant text: what makes a search look at the right heads.

By default they are of the offline tasks, with the tasks' own answers. They may be pieces of a text, and answers may be
what the dense model says, greedily, as in MoA's public code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from sparse_patch.calibration.moa.influence import BLOCK
from sparse_patch.calibration.prompts import text_prompts
from sparse_patch.errors import TaskError
from sparse_patch.models.loading import check_context
from sparse_patch.workbench.generation import continue_greedily, encode, prefill, stop_tokens
from sparse_patch.workbench.tasks import tasks_of

ANSWER = 128  # tokens of an answer, at most; MoA's public code generates as many
SHORTEST = 512  # tokens of prompt and answer together

Answers = Literal["task", "model"]


@dataclass(frozen=True)
class Prompt:
    """A prompt and its answer, together no longer than the length that it stands for.

    Attributes:
        task: what it is of.
        tokens: of the prompt.
        answer: tokens after it; empty where the model is to give them.
    """

    task: str
    tokens: list[int]
    answer: list[int]


def check_lengths(model: PreTrainedModel, lengths: Sequence[int], option: str) -> None:
    """Raise TaskError for a length that cannot be searched at."""
    for length in lengths:
        if length < SHORTEST or length % BLOCK:
            raise TaskError(f"{option}: expected multiples of {BLOCK} from {SHORTEST} on, got {length}")
        check_context(model, length - ANSWER, ANSWER, option)


def task_prompts(
    tokenizer: Any, tasks: Sequence[str], length: int, samples: int, seed: int, answers: Answers
) -> list[Prompt]:
    """Prompts of offline tasks, in turn.

    Raises:
        TaskError: there is no such task, or the length is too short for one.
    """
    chosen = tasks_of("all", tasks)
    prompts = []
    for number in range(samples):
        task = chosen[number % len(chosen)]
        sample = task.sample(tokenizer, length - ANSWER, seed, number // len(chosen))
        tokens, answer = encode(tokenizer, sample.prompt, sample.answer)
        prompts.append(Prompt(task.name, tokens, answer[:ANSWER] if answers == "task" else []))
    return prompts


def pieces(model: PreTrainedModel, tokenizer: Any, path: Path, lengths: Sequence[int]) -> list[Prompt]:
    """Pieces of a text, one after the other, one of each length, for the model to go on from.

    Raises:
        TaskError: the file cannot be read or has too few tokens.
    """
    texts = text_prompts(model, tokenizer, path, [length - ANSWER for length in lengths], 1)
    return [Prompt("text", tokens, []) for tokens in texts]


def answer_of(model: PreTrainedModel, tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    """What the dense model says after a prompt, greedily."""
    start = prefill(model, tokens)
    first = int(start.logits.argmax())
    return continue_greedily(model, [first], start.cache, ANSWER, stop_tokens(model, tokenizer))
