"""Long prompts with answers that depend on distant text, so that the search looks at the right heads.

By default the prompts are those of the offline tasks, with the tasks' own answers. They can also be pieces of a text,
and answers can be what the dense model generates greedily, as in MoA's public code.
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

ANSWER = 128  # most tokens of an answer; MoA's public code generates as many
SHORTEST = 512  # least tokens of prompt and answer together

Answers = Literal["task", "model"]


@dataclass(frozen=True)
class Prompt:
    """A prompt and its answer; together they have at most as many tokens as the length they stand for.

    Attributes:
        task: name of the prompt's task.
        tokens: tokens of the prompt.
        answer: tokens of the answer; empty if the model shall generate it.
    """

    task: str
    tokens: list[int]
    answer: list[int]


def check_lengths(model: PreTrainedModel, lengths: Sequence[int], option: str) -> None:
    """Raise TaskError if the search cannot run at one of the lengths."""
    for length in lengths:
        if length < SHORTEST or length % BLOCK:
            raise TaskError(f"{option}: expected multiples of {BLOCK} from {SHORTEST} on, got {length}")
        check_context(model, length - ANSWER, ANSWER, option)


def task_prompts(
    tokenizer: Any, tasks: Sequence[str], length: int, samples: int, seed: int, answers: Answers
) -> list[Prompt]:
    """Make prompts of offline tasks, in turn.

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
    """Cut a text into consecutive pieces, one per length, for the model to continue.

    Raises:
        TaskError: the file cannot be read or has too few tokens.
    """
    texts = text_prompts(model, tokenizer, path, [length - ANSWER for length in lengths], 1)
    return [Prompt("text", tokens, []) for tokens in texts]


def answer_of(model: PreTrainedModel, tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    """Generate greedily after a prompt with the dense model."""
    start = prefill(model, tokens)
    first = int(start.logits.argmax())
    return continue_greedily(model, [first], start.cache, ANSWER, stop_tokens(model, tokenizer))
