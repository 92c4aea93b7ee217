"""The classes of a task, its samples and their questions."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from sparse_patch.errors import TaskError
from sparse_patch.workbench.prompts import Count, Draft, default_haystack, token_counter
from sparse_patch.workbench.tasks.drafts import first_fit


@dataclass(frozen=True)
class Question:
    """A question about a text, and its answer.

    Attributes:
        input: the question, which follows the text.
        gen_prefix: beginning of the answer, given to the model.
        outputs: the strings that RULER's score looks for.
        answer: the whole continuation of the prompt, without a closing full stop.
    """

    input: str
    gen_prefix: str
    outputs: list[str]
    answer: str

    @property
    def text(self) -> str:
        return _join(self.input, self.gen_prefix)


@dataclass(frozen=True)
class Sample:
    """One prompt and its expected answer. Field names are those of RULER's files.

    Attributes:
        task: the task's name.
        index: number of the sample.
        input: text and question.
        gen_prefix: beginning of the answer. The prompt is `input` and `gen_prefix`, joined by a space if neither has
            one there.
        outputs: the strings that the score looks for in the generated text.
        answer: the whole continuation of the prompt, without a closing full stop.
        length: tokens of the prompt, special tokens included.
        max_new_tokens: tokens to generate for the score: RULER's number, or the answer's tokens if they are more.
        forced: whether the score looks at the model's prediction of each answer token after the right tokens before it,
            not at freely generated text.
        compared: number of the answer's first tokens at which the model's predictions are compared with those of dense
            attention; 0 if the answer is scored.
    """

    task: str
    index: int
    input: str
    gen_prefix: str
    outputs: list[str]
    answer: str
    length: int
    max_new_tokens: int
    forced: bool
    compared: int

    @property
    def prompt(self) -> str:
        return _join(self.input, self.gen_prefix)


@dataclass(frozen=True)
class Task(ABC):
    """A kind of prompt.

    Attributes:
        name: RULER's name, if RULER has the task.
        summary: the question, in one line.
        max_new_tokens: least number of tokens to generate for the score, or of tokens that are compared.
        forced, compared: see `Sample`.
    """

    name: str
    summary: str
    max_new_tokens: int
    forced: ClassVar[bool] = False
    compared: ClassVar[int] = 0

    def sample(self, tokenizer: Any, length: int, seed: int = 0, index: int = 0, haystack: str | None = None) -> Sample:
        """Make the sample of this seed, length and index for a Transformers tokenizer.

        Args:
            tokenizer: counts the tokens.
            length: tokens of the prompt.
            seed: determines everything random, together with the task's name, `length` and `index`.
            index: number of the sample.
            haystack: the text to hide things in; by default Python's own help topics.

        Raises:
            TaskError: the length is too short for what is hidden, or the haystack is too short for the length.
        """
        rng = Random(f"{seed} {self.name} {length} {index}")
        count = token_counter(tokenizer)
        text = default_haystack() if haystack is None else haystack
        try:
            prompt, question = first_fit(lambda: self.draft(rng, length, count, text), length, count)
        except TaskError as error:
            raise TaskError(f"{self.name}: {error}") from None
        return Sample(
            task=self.name,
            index=index,
            input=prompt[: len(prompt) - len(question.text)] + question.input,
            gen_prefix=question.gen_prefix,
            outputs=question.outputs,
            answer=question.answer,
            length=length,
            max_new_tokens=self.compared or max(self.max_new_tokens, count(question.answer)),
            forced=self.forced,
            compared=self.compared,
        )

    @abstractmethod
    def draft(self, rng: Random, length: int, count: Count, haystack: str) -> tuple[Draft, Question]:
        """Make a text of at least `length` tokens that ends with the question, and the question itself."""


def _join(text: str, gen_prefix: str) -> str:
    """Join as lm-eval does: with a space, unless one of the two has whitespace there."""
    if not gen_prefix or text[-1:].isspace() or gen_prefix[0].isspace():
        return text + gen_prefix
    return f"{text} {gen_prefix}"
