"""Key-value retrieval, as in Lost in the Middle."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from sparse_patch.workbench.prompts import Count, Draft
from sparse_patch.workbench.tasks.base import Question, Task
from sparse_patch.workbench.tasks.drafts import FILLER, draw, enough


@dataclass(frozen=True)
class KeyValueRetrieval(Task):
    """A JSON object of UUIDs, as in "Lost in the Middle" (Liu et al. 2023, arXiv 2307.03172, section 3)."""

    def draft(self, rng: Random, length: int, count: Count, haystack: str) -> tuple[Draft, Question]:
        key, value = draw("uuids", rng), draw("uuids", rng)
        question = Question(
            input=f'}}\n\nKey: "{key}"\n', gen_prefix="Corresponding value:", outputs=[value], answer=f' "{value}"'
        )
        head = (
            'Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"note": "'
        )

        def another() -> str:
            return f'"{draw("uuids", rng)}": "{draw("uuids", rng)}"'

        def tokens(pairs: Sequence[str]) -> int:
            return count(head + FILLER + _json(pairs) + question.text)

        pairs = enough([f'"{key}": "{value}"'], another, tokens, length)
        rng.shuffle(pairs)
        return Draft(head, FILLER, _json(pairs) + question.text), question


def _json(pairs: Sequence[str]) -> str:
    """The JSON object after its note, without the closing brace."""
    return '", ' + ", ".join(pairs)
