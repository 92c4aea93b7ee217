"""Texts that go on: tasks in which a model's predictions are compared with those of dense attention.

Damage shows here long before an answer is lost. In `copy` nearly every prediction depends on a passage far back, in
`prose` few do.
"""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from sparse_patch.workbench.prompts import Count, Draft, excerpt, opening, sentence_end
from sparse_patch.workbench.tasks.base import Question, Task

_CUE = 32  # tokens of the passage that are given: enough to find it, and to say that it is being copied
_SPARE = 4  # tokens that a tokenizer may put around a text


@dataclass(frozen=True)
class Copy(Task):
    """A text in which a passage of its first half begins again at the end; the rest of the passage is compared."""

    compared: ClassVar[int] = 64

    def draft(self, rng: Random, length: int, count: Count, haystack: str) -> tuple[Draft, Question]:
        text = excerpt(haystack, length - _CUE, count, rng)
        start = sentence_end(text, rng.uniform(0.1, 0.5))
        passage = text[start:].lstrip()
        cue = opening(passage, _CUE, count)
        answer = opening(passage[len(cue) :], self.compared + _SPARE, count)
        question = Question(input=f"\n\n{cue}", gen_prefix="", outputs=[], answer=answer)
        return Draft("", text[:start], text[start:] + question.text), question


@dataclass(frozen=True)
class Prose(Task):
    """Any text; what follows it is compared."""

    compared: ClassVar[int] = 64

    def draft(self, rng: Random, length: int, count: Count, haystack: str) -> tuple[Draft, Question]:
        text = excerpt(haystack, length + 2 * self.compared, count, rng)
        prompt = opening(text, length + _SPARE, count)
        answer = opening(text[len(prompt) :], self.compared + _SPARE, count)
        return Draft("", prompt, ""), Question(input="", gen_prefix="", outputs=[], answer=answer)
