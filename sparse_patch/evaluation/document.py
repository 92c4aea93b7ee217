"""A long document with needles and a question about each; the demo and the example read it."""

from dataclasses import dataclass
from random import Random
from typing import Any

from sparse_patch.workbench.prompts import Draft, default_haystack, hide, token_counter
from sparse_patch.workbench.tasks import NEEDLE, OPENING, NeedleTask, Question, distinct, draw, filling, first_fit


@dataclass(frozen=True)
class NeedleDocument:
    """A document with needles and questions about them. The document followed by one question is a prompt.

    Attributes:
        text: the document.
        keys: names of the needles, in the order of the text.
        questions: one question per needle, in the order of the text.
        depths: position of each needle, from 0 (start of the document) to 1 (end).
    """

    text: str
    keys: list[str]
    questions: list[Question]
    depths: list[float]


def needle_document(tokenizer: Any, length: int, needles: int = 8, seed: int = 0) -> NeedleDocument:
    """Make a document whose prompt with the longest question has exactly `length` tokens.

    Args:
        tokenizer: a Transformers tokenizer.
        length: tokens of the document plus those of the longest question, tokenized separately.
        needles: how many numbers to hide, at evenly spread depths.
        seed: determines the text, keys and values.

    Raises:
        TaskError: the length is too short for the needles, or the haystack is too short for the length.
    """
    rng = Random(f"{seed} document {length} {needles}")
    task = NeedleTask("document", "", 128)
    pairs = [(key, draw("numbers", rng)) for key in distinct(lambda: draw("words", rng), needles)]
    pieces = [NEEDLE.format(kind="numbers", key=key, value=value) for key, value in pairs]
    questions = [task.question([key], pairs) for key, _ in pairs]
    tokens = token_counter(tokenizer)
    asking = max(len(tokenizer(question.text, add_special_tokens=False)["input_ids"]) for question in questions)

    def count(text: str) -> int:
        return tokens(text) + asking

    head = OPENING.format(kind="numbers")
    room = length - count(head + "".join(pieces))
    depths = [(number + 0.5) / needles for number in range(needles)]

    def draft() -> tuple[Draft, None]:
        passage = filling("text", default_haystack(), room, pieces, tokens, rng)
        return hide(pieces, depths, passage, head, ""), None

    text, _ = first_fit(draft, length, count)
    return NeedleDocument(
        text, [key for key, _ in pairs], questions, [text.index(piece) / len(text) for piece in pieces]
    )
