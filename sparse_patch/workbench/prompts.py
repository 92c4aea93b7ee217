"""Prompts of an exact number of tokens: pieces of text hidden in a haystack, one passage of which is cut to length.

All functions work on text and count the tokens of whole texts, so they work for any tokenizer. A prompt that is stored
as text has the same number of tokens whenever it is tokenized again.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from sparse_patch.errors import ConfigError, TaskError, one_line
from sparse_patch.files.reading import read_text

NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."  # RULER's

_SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？]|\n")  # noqa: RUF001
_MOST_BYTES = 2**30  # most bytes of a haystack
_REACH = 120  # characters around the best cut that are tried one by one

Count = Callable[[str], int]


class TooShortError(TaskError):
    """A draft does not fit the length."""


@dataclass(frozen=True)
class Draft:
    """A text with one passage, the filler, that may lose characters at its start."""

    head: str
    filler: str
    tail: str

    def text(self, kept: int, joint: str = "") -> str:
        """The text with only the last `kept` characters of the filler, and `joint` before them."""
        return self.head + joint + self.filler[len(self.filler) - kept :] + self.tail


def token_counter(tokenizer: Any) -> Count:
    """Return a function that counts the tokens of a text as a prompt, special tokens included."""
    return lambda text: len(tokenizer(text, verbose=False)["input_ids"])


def default_haystack() -> str:
    """Python's help topics: about 700 kB of English technical text that ships with every CPython."""
    from pydoc_data.topics import topics

    text = "\n".join(topics.values()).replace("\r", "").encode("ascii", "ignore").decode()
    text = re.sub(r"[ \t]{3,}", "  ", text)
    text = re.sub(r"\n{3,}", "\n\n", text)
    return re.sub(r"([=\-~^*#_+.])\1{5,}", r"\1\1\1\1", text)


def read_haystack(path: str | Path, option: str = "--haystack") -> str:
    """Read a UTF-8 text file.

    Raises:
        TaskError: the file is missing, is not text or is empty. The message begins with the option that named the file.
    """
    try:
        text = read_text(path, _MOST_BYTES)
    except ConfigError as error:
        raise TaskError(f"{option}: {one_line(path)}: cannot be read as UTF-8 text: {error}") from None
    if not text.strip():
        raise TaskError(f"{option}: {one_line(path)}: the file is empty")
    return text.replace("\r", "")


@cache
def english_words() -> tuple[str, ...]:
    """2000 common words that keys are made of; the shipped model was trained with such keys."""
    return tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())


def excerpt(text: str, tokens: int, count: Count, rng: Random) -> str:
    """Take a passage of `tokens` tokens or a few more from a random place of the text.

    Raises:
        TaskError: the whole text has fewer tokens.
    """
    chars = min(len(text), 4 * tokens + 64)
    start = rng.randrange(len(text) - chars + 1)
    short, long, enough = 0, len(text) + 1, None
    while long - short > 1:
        first = min(start, len(text) - chars)
        passage = text[first : first + chars]
        have = count(passage)
        if have < tokens:
            short = chars
        else:
            long, enough = chars, passage
            if have <= 1.02 * tokens + 16:
                break
        wanted = int(chars * (1.01 * tokens + 8) / max(have, 1))
        chars = min(max(wanted, short + 1), long - 1)
    if enough is None:
        raise TaskError(
            f"the haystack has {have} tokens, the prompt needs {tokens}; give a longer text or a smaller length"
        )
    return enough


def opening(text: str, tokens: int, count: Count) -> str:
    """The shortest beginning of the text, up to white space, that has at least `tokens` tokens.

    Raises:
        TooShortError: the text has no such beginning.
    """
    ends = [match.start() for match in re.finditer(r"\s", text)]
    number = bisect_left(ends, tokens, key=lambda end: count(text[:end]))
    if number == len(ends):
        raise TooShortError(f"the length is too short, about {tokens} tokens more are needed")
    return text[: ends[number]]


def sentence_end(text: str, depth: float) -> int:
    """The first sentence end at or behind a depth from 0 to 1; the last one if none is behind it."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)] or list(range(1, len(text) + 1))
    return next((end for end in ends if end >= depth * len(text)), ends[-1])


def hide(pieces: Sequence[str], depths: Sequence[float], passage: str, head: str, tail: str) -> Draft:
    """Put the pieces into the passage, each after the first sentence end at or behind its depth.

    Args:
        pieces: texts to hide, in the order of the text.
        depths: depths of the pieces, ascending, from 0 (start of the passage) to 1 (end).
        passage: the text around the pieces. Its longest part between two pieces becomes the filler.
        head: what stands before everything.
        tail: what stands after everything.
    """
    cuts = [sentence_end(passage, depth) for depth in depths]
    parts = [passage[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(passage)], strict=True)]
    longest = max(range(len(parts)), key=lambda number: len(parts[number]))
    before = "".join(part + piece for part, piece in zip(parts[:longest], pieces, strict=False))
    after = "".join(piece + part for piece, part in zip(pieces[longest:], parts[longest + 1 :], strict=True))
    return Draft(head + before, parts[longest], after + tail)


def fit(draft: Draft, length: int, count: Count) -> str | None:
    """Cut the draft's filler so that the text has exactly `length` tokens. The filler begins at a word if possible.

    Return None if no cut near the best one gives the length. A tokenizer may cause this for a rare draft; try another.

    Raises:
        TooShortError: the draft is too long even without its filler.
    """
    low, high = 0, len(draft.filler)
    below, above = count(draft.text(low)), count(draft.text(high))
    if below > length:
        raise TooShortError(f"length {length} is too short, about {below} tokens are needed")
    halve = False
    while above > length and high - low > 1:
        # Interpolation between the ends is nearly right, bisection never gets stuck: the two take turns.
        share = 0.5 if halve else (length - below) / (above - below)
        halve = not halve
        middle = min(max(low + round((high - low) * share), low + 1), high - 1)
        tokens = count(draft.text(middle))
        if tokens == length:
            low, high, above = middle, middle, tokens
        elif tokens < length:
            low, below = middle, tokens
        else:
            high, above = middle, tokens
    near = _near_misses(draft, high, length - above, count)
    return next((text for text in near if count(text) == length), None)


def _near_misses(draft: Draft, kept: int, missing: int, count: Count) -> Iterator[str]:
    """Yield texts that should have `missing` more tokens than `draft.text(kept)`, judged by the text around the cut.

    One more character can add two tokens, so for some lengths no cut fits. A joint of one or two tokens then helps.
    """
    cuts = _cuts_around(draft.filler, kept)
    end = len(draft.filler) - max(0, min(cuts) - _REACH)

    def around(cut: int, joint: str) -> int:
        return count(draft.head[-_REACH:] + joint + draft.filler[len(draft.filler) - cut : end])

    wanted = around(kept, "") + missing
    for joint in ("", "\n", ".\n", " -\n"):
        for cut in cuts:
            if around(cut, joint) == wanted:
                yield draft.text(cut, joint)


def _cuts_around(filler: str, kept: int) -> list[int]:
    """Numbers of characters to keep, nearest to `kept` first. Near cuts that begin a word come before all others."""
    near = range(max(0, kept - _REACH), min(len(filler), kept + _REACH) + 1)

    def order(cut: int) -> tuple[bool, int]:
        begins_a_word = cut == len(filler) or filler[-cut - 1 : len(filler) - cut].isspace() or cut == 0
        return not (begins_a_word and abs(cut - kept) <= 16), abs(cut - kept)

    return sorted(near, key=order)
