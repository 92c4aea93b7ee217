"""The building blocks of prompts: passages, hiding places and exact fits, on deliberately difficult tokenizers."""

import random
from pathlib import Path

import pytest
from tiny_tokenizers import byte_fallback_bpe, unigram

from sparse_patch.errors import TaskError
from sparse_patch.workbench.prompts import (
    NOISE,
    Draft,
    TooShortError,
    default_haystack,
    excerpt,
    fit,
    hide,
    read_haystack,
    token_counter,
)


@pytest.mark.parametrize("tokens", [1, 5, 30, 200, 3000])
def test_an_excerpt_has_enough_tokens_and_few_more(tokens: int) -> None:
    """This holds even if the text's token density varies so much that every estimate is wrong."""
    uneven = ("a " * 400 + "incomprehensibilities " * 60 + "0123456789" * 40 + "\n" * 300) * 20
    for tokenizer in (byte_fallback_bpe(), unigram()):
        count = token_counter(tokenizer)
        for seed in range(12):
            for text in (default_haystack()[:100_000], uneven):
                passage = excerpt(text, tokens, count, random.Random(seed))
                assert passage in text and tokens <= count(passage) <= 1.02 * tokens + 60


def test_excerpts_begin_anywhere() -> None:
    count = token_counter(byte_fallback_bpe())
    starts = [
        default_haystack().index(excerpt(default_haystack(), 500, count, random.Random(seed))) for seed in range(20)
    ]
    assert min(starts) < 150_000 and max(starts) > 400_000


def test_a_text_that_is_too_short() -> None:
    with pytest.raises(TaskError, match=r"the haystack has \d+ tokens, the prompt needs 100; give a longer text"):
        excerpt("a few words", 100, token_counter(unigram()), random.Random(0))


def test_pieces_go_behind_sentence_ends_in_their_order() -> None:
    passage = "One one one. Two two two! Three three\nFour four four. Five five five five five five"
    draft = hide([" A.", " B.", " C."], [0.0, 0.3, 0.5], passage, "head:", "?")
    assert draft.text(len(draft.filler)) == (
        "head:One one one. A. Two two two! B. Three three\nFour four four. C. Five five five five five five?"
    )
    assert draft.filler == " Five five five five five five"
    assert hide(["X"], [0.5], "no end of a sentence", "", "").text(99).count("X") == 1


@pytest.mark.parametrize("length", range(40, 80))
def test_a_fit_is_exact_and_keeps_the_end_of_the_filler(length: int) -> None:
    draft = Draft("Begin. ", NOISE * 4, " The end.")
    for tokenizer in (byte_fallback_bpe(), unigram()):
        count = token_counter(tokenizer)
        text = fit(draft, length, count)
        assert text is not None and count(text) == length
        assert text.startswith("Begin. ") and text.endswith("back again. The end.")


def test_a_fit_that_cannot_be() -> None:
    count = token_counter(unigram())
    with pytest.raises(TooShortError, match=r"length 3 is too short, about \d+ tokens are needed"):
        fit(Draft("Begin. " * 4, NOISE, " The end."), 3, count)
    assert fit(Draft("a", " b", " c"), 500, count) is None


def test_default_haystack_is_plain_ascii() -> None:
    text = default_haystack()
    assert len(text) > 400_000 and text.isascii() and "\r" not in text and "\n\n\n" not in text


def test_read_haystack(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Zeile eins\r\nÜber".encode())
    assert read_haystack(tmp_path / "a.txt") == "Zeile eins\nÜber"
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("empty.txt", "the file is empty"),
        ("binary.txt", "cannot be read as UTF-8"),
        ("", "cannot be"),
    ):
        with pytest.raises(TaskError, match=message):
            read_haystack(tmp_path / name)
