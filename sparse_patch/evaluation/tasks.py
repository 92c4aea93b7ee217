"""Long documents with needles: RULER's single-needle wording, an exact number of tokens, reproducible from a seed."""

import random
import re
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

_OPENING = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n"
)
_NEEDLE = " One of the special magic numbers for {key} is: {value}."
_QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)


@dataclass(frozen=True)
class Question:
    """A question about one needle.

    Attributes:
        key: what the needle is called in the text.
        answer: the number to give back.
        depth: where the needle stands, from 0 (start of the document) to 1.
        tokens: the question, to follow the document.
    """

    key: str
    answer: str
    depth: float
    tokens: list[int]


@dataclass(frozen=True)
class NeedleDocument:
    """A document with needles, and a question for each. `tokens` and any one question make a prompt."""

    tokens: list[int]
    questions: list[Question]


def needle_document(
    tokenizer: Any, length: int, needles: int = 8, seed: int = 0, haystack: str | None = None
) -> NeedleDocument:
    """A document of which the prompt with the longest question has exactly `length` tokens.

    Args:
        tokenizer: a tokenizer of Transformers.
        length: tokens of document and longest question together.
        needles: how many needles, at evenly spread depths.
        seed: chooses haystack position, keys and values.
        haystack: the text around the needles; by default Python's own help topics, which every CPython ships.

    Raises:
        ValueError: the length is too short for the needles, or the haystack for the length.
    """
    rng = random.Random(seed)
    text = clean_text(default_haystack() if haystack is None else haystack)
    words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
    keys = [f"{rng.choice(words)}-{rng.choice(words)}" for _ in range(needles)]
    values = [str(rng.randrange(10**6, 10**7)) for _ in range(needles)]
    pieces = [_encode(tokenizer, _NEEDLE.format(key=key, value=value)) for key, value in zip(keys, values, strict=True)]
    questions = [_encode(tokenizer, _QUESTION.format(key=key)) for key in keys]
    opening = [*_prefix(tokenizer), *_encode(tokenizer, _OPENING)]
    room = length - len(opening) - sum(map(len, pieces)) - max(map(len, questions))
    if room < 2 * needles:
        raise ValueError(
            f"length {length} is too short for {needles} needles; {length - room + 2 * needles} is the least"
        )
    hay = _excerpt(tokenizer, text, room, rng)
    tokens, positions = _insert(tokenizer, hay, pieces)
    return NeedleDocument(
        tokens=opening + tokens,
        questions=[
            Question(key, value, position / len(tokens), question)
            for key, value, position, question in zip(keys, values, positions, questions, strict=True)
        ],
    )


def default_haystack() -> str:
    """Python's help topics: about 700 kB of English technical text."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def clean_text(text: str) -> str:
    """Plain ASCII text without long runs of spaces, blank lines or rules."""
    text = text.replace("\r", "").encode("ascii", "ignore").decode()
    text = re.sub(r"[ \t]{3,}", "  ", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return re.sub(r"([=\-~^*#_+.])\1{5,}", r"\1\1\1\1", text)


def _encode(tokenizer: Any, text: str) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return tokens


def _prefix(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _excerpt(tokenizer: Any, text: str, room: int, rng: random.Random) -> list[int]:
    """`room` tokens of the text from a random place."""
    hay = _encode(tokenizer, text)
    if len(hay) < room:
        raise ValueError(f"the haystack has {len(hay)} tokens, the prompt needs {room}; give a longer text or length")
    start = rng.randrange(len(hay) - room + 1)
    return hay[start : start + room]


def _insert(tokenizer: Any, hay: list[int], pieces: list[list[int]]) -> tuple[list[int], list[int]]:
    """The hay with the pieces after sentence ends at evenly spread depths, and where each piece begins."""
    ends = [i + 1 for i, text in enumerate(tokenizer.batch_decode([[token] for token in hay])) if _ends_sentence(text)]
    tokens: list[int] = []
    positions, taken = [], 0
    for number, piece in enumerate(pieces):
        target = int((number + 0.5) / len(pieces) * len(hay))
        nearest = bisect_left(ends, max(target, taken))
        cut = ends[nearest] if nearest < len(ends) else max(target, taken)
        tokens += hay[taken:cut]
        positions.append(len(tokens))
        tokens += piece
        taken = cut
    return tokens + hay[taken:], positions


def _ends_sentence(text: str) -> bool:
    return text.endswith(".") or "\n" in text
