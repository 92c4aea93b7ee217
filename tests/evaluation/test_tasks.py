"""Needle documents: exact length, right depths, reproducible."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sparse_patch.evaluation.tasks import clean_text, needle_document


@pytest.fixture(scope="module")
def tokenizer(needle_llama_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(needle_llama_path)


@pytest.mark.parametrize("length", [1024, 4096, 5001])
def test_the_longest_prompt_has_exactly_the_length(tokenizer: Any, length: int) -> None:
    document = needle_document(tokenizer, length, seed=3)
    assert max(len(document.tokens) + len(question.tokens) for question in document.questions) == length
    assert document.tokens[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in document.tokens[1:]


def test_every_needle_is_in_the_text_at_its_depth_after_a_sentence(tokenizer: Any) -> None:
    document = needle_document(tokenizer, 6000, needles=8)
    text = tokenizer.decode(document.tokens)
    for number, question in enumerate(document.questions):
        needle = f" One of the special magic numbers for {question.key} is: {question.answer}."
        before, found, _ = text.partition(needle)
        assert found and (before.endswith(".") or "\n" in before[-3:])
        assert question.depth == pytest.approx((number + 0.5) / 8, abs=0.03)
        assert question.depth == pytest.approx(len(before) / len(text), abs=0.05)
        assert tokenizer.decode(question.tokens).endswith(f"for {question.key} mentioned in the provided text is")


def test_the_seed_decides(tokenizer: Any) -> None:
    assert needle_document(tokenizer, 2048, seed=1) == needle_document(tokenizer, 2048, seed=1)
    assert needle_document(tokenizer, 2048, seed=1) != needle_document(tokenizer, 2048, seed=2)


def test_what_does_not_fit(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"length 200 is too short for 8 needles; [0-9]+ is the least"):
        needle_document(tokenizer, 200)
    with pytest.raises(ValueError, match=r"the haystack has [0-9]+ tokens, the prompt needs [0-9]+"):
        needle_document(tokenizer, 2048, haystack="Some words here. " * 20)


def test_clean_text() -> None:
    assert clean_text("a\r\n\n\n\nb    c ======== é") == "a\n\nb  c ==== "
