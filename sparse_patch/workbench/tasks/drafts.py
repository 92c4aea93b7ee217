"""The parts of drafts: random keys and values, text to hide them in, and drafts that fit a length."""

import uuid
from collections.abc import Callable, Sequence
from random import Random
from typing import Literal, TypeVar

from sparse_patch.errors import TaskError
from sparse_patch.workbench.prompts import NOISE, Count, Draft, TooShortError, english_words, excerpt, fit

Kind = Literal["numbers", "words", "uuids"]
Hay = Literal["noise", "text", "needles"]
Asked = TypeVar("Asked")
FILLER = NOISE * 8  # longer than any one needle


def draw(kind: Kind, rng: Random) -> str:
    """Draw a number of seven digits, two words with a hyphen, or a UUID."""
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    if kind == "words":
        return f"{rng.choice(english_words())}-{rng.choice(english_words())}"
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def distinct(make: Callable[[], str], number: int) -> list[str]:
    """Make `number` different texts."""
    taken: set[str] = set()
    return [other(taken, make) for _ in range(number)]


def other(taken: set[str], make: Callable[[], str]) -> str:
    """Make a text that is not in `taken`, and add it there."""
    while (new := make()) in taken:
        pass
    taken.add(new)
    return new


def listed(words: Sequence[str]) -> str:
    """Join words as `a`, or `a, b, and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])}, and {words[-1]}"


def first_fit(make: Callable[[], tuple[Draft, Asked]], length: int, count: Count) -> tuple[str, Asked]:
    """The first draft that can be cut to the length, and the question about it."""
    reason = TaskError(f"no prompt of exactly {length} tokens was found for this tokenizer; try another length")
    for _ in range(20):
        try:
            draft, question = make()
            text = fit(draft, length, count)
        except TooShortError as error:  # another draft may hide its pieces elsewhere
            reason = error
        else:
            if text is not None:
                return text, question
    raise reason


def filling(hay: Hay, text: str, room: int, pieces: Sequence[str], count: Count, rng: Random) -> str:
    """Noise or text that fills `room` tokens, with a few to spare, because each joint may save a token."""
    if room < 1:
        raise TaskError(f"the length is too short for what is hidden; at least {1 - room} more tokens are needed")
    tokens = room + 8 + 2 * len(pieces)
    if hay == "noise":
        text = NOISE * (tokens // 12 + 2)
    return excerpt(text, tokens, count, rng)


def enough(
    items: list[str], another: Callable[[], str], tokens: Callable[[Sequence[str]], int], length: int
) -> list[str]:
    """The items, and as many others as needed for a text of at least `length` tokens, but not one more."""
    cost = tokens([*items, another()]) - tokens(items)
    while (missing := length - tokens(items)) > 0:
        items += [another() for _ in range(max(1, int(0.8 * missing / cost)))]  # not all at once: costs differ
    return items
