"""RULER's needles in a haystack, and a task that recites all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from sparse_patch.workbench.prompts import Count, Draft, hide
from sparse_patch.workbench.tasks.base import Question, Task
from sparse_patch.workbench.tasks.drafts import FILLER, Hay, Kind, distinct, draw, enough, filling, listed, other

NEEDLE = " One of the special magic {kind} for {key} is: {value}."
OPENING = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)


@dataclass(frozen=True)
class NeedleTask(Task):
    """Values of keys are hidden in noise, in text or among other needles; some of them are asked for.

    Attributes:
        haystack: RULER's noise sentences, a text, or needles with other keys.
        keys: kind of the keys.
        values: kind of the values.
        num_keys: number of hidden keys.
        num_values: number of values per key.
        num_queries: number of keys that are asked for.
    """

    haystack: Hay = "text"
    keys: Kind = "words"
    values: Kind = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def draft(self, rng: Random, length: int, count: Count, haystack: str) -> tuple[Draft, Question]:
        keys = distinct(lambda: draw(self.keys, rng), max(self.num_keys, self.num_queries))
        pairs = [(key, draw(self.values, rng)) for key in keys for _ in range(self.num_values)]
        rng.shuffle(pairs)
        needles = [NEEDLE.format(kind=self.values, key=key, value=value) for key, value in pairs]
        question = self.question(rng.sample(keys, self.num_queries), pairs)
        head, tail = OPENING.format(kind=self.values), question.text
        if self.haystack == "needles":
            return self._among_needles(needles, set(keys), rng, length, count, head, tail), question
        room = length - count(head + "".join(needles) + tail)
        passage = filling(self.haystack, haystack, room, needles, count, rng)
        return hide(needles, sorted(rng.random() for _ in needles), passage, head, tail), question

    def _among_needles(
        self, needles: Sequence[str], taken: set[str], rng: Random, length: int, count: Count, head: str, tail: str
    ) -> Draft:
        """Hide the needles among as many others as fit; noise fills a rest that is shorter than a needle."""

        def another() -> str:
            key = other(taken, lambda: draw(self.keys, rng))
            return NEEDLE.format(kind=self.values, key=key, value=draw(self.values, rng))

        others = enough(list(needles), another, lambda texts: count(head + FILLER + "".join(texts) + tail), length)
        rng.shuffle(others)
        return Draft(head, FILLER, "".join(others) + tail)

    def question(self, asked: Sequence[str], pairs: Sequence[tuple[str, str]]) -> Question:
        values = [value for key in asked for needle, value in pairs if needle == key]
        keys, kind = listed(asked), self.values
        if len(values) == 1 and kind != "words":  # the wording of needle-llama's training, and RULER's for one number
            what, where, verb = f"What is the special magic {kind[:-1]}", f"The special magic {kind[:-1]}", "is"
        else:
            what, where, verb = f"What are all the special magic {kind}", f"The special magic {kind}", "are"
        return Question(
            input=f"\n{what} for {keys} mentioned in the provided text?",
            gen_prefix=f"{where} for {keys} mentioned in the provided text {verb}",
            outputs=values,
            answer=f" {listed(values)}",
        )


@dataclass(frozen=True)
class Recite(Task):
    """Needles in a text, all of which are asked for in order: hundreds of tokens, each a separate retrieval.

    Attributes:
        num_keys: number of hidden needles; fewer in short prompts.
        spacing: least number of prompt tokens per needle.

    The score is forced, because after one omitted number a free run would be off by one for the rest of the list.
    """

    forced: ClassVar[bool] = True
    num_keys: int = 64
    spacing: int = 120

    def draft(self, rng: Random, length: int, count: Count, haystack: str) -> tuple[Draft, Question]:
        keys = distinct(lambda: draw("words", rng), max(2, min(self.num_keys, length // self.spacing)))
        pairs = [(key, draw("numbers", rng)) for key in keys]
        needles = [NEEDLE.format(kind="numbers", key=key, value=value) for key, value in pairs]
        question = Question(
            input="\nList every special magic number in the order of the provided text:",
            gen_prefix="",
            outputs=[f"{key}: {value}" for key, value in pairs],
            answer="".join(f"\n{key}: {value}" for key, value in pairs),
        )
        head = OPENING.format(kind="numbers")
        room = length - count(head + "".join(needles) + question.text)
        passage = filling("text", haystack, room, needles, count, rng)
        return hide(needles, sorted(rng.random() for _ in needles), passage, head, question.text), question
