"""Prefill, forced answers and free generation, compared with `generate` and a single forward."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import gemma3, llama
from tiny_tokenizers import byte_fallback_bpe, unigram
from transformers import DynamicCache, PreTrainedModel

from sparse_patch import patched
from sparse_patch.errors import SparsePatchError, TaskError
from sparse_patch.integration.caches.rings import RingLayer
from sparse_patch.models.loading import check_context, load_model
from sparse_patch.workbench.generation import continue_greedily, encode, force, prefill, stop_tokens


@pytest.mark.parametrize("family", [llama, gemma3])
def test_the_detour_is_what_generate_gives(family: type) -> None:
    """They agree from the first wrong prediction on, also past sliding windows, whose cache cannot be cropped."""
    model: PreTrainedModel = family()
    prompt = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(1))
    greedy = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 40:].tolist()
    expected = [*greedy[:4], (greedy[4] + 1) % 90, *greedy[5:10]]
    forced = force(model, prefill(model, prompt[0].tolist()), expected, fork=True)
    with torch.no_grad():
        logits = model(torch.tensor([prompt[0].tolist() + expected])).logits[0, 39:-1]
    assert forced.right == [int(row.argmax()) == token for row, token in zip(logits, expected, strict=True)]
    assert forced.right[:5] == [True] * 4 + [False] and forced.seconds > 0
    assert forced.detour is not None and forced.detour[0] == greedy[:5]
    assert continue_greedily(model, *forced.detour, 12, []) == greedy


def test_no_detour_without_a_mistake() -> None:
    model = llama()
    prompt = [5, 6, 7, 8]
    greedy = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)[0, 4:].tolist()
    forced = force(model, prefill(model, prompt), greedy, fork=True)
    assert forced.detour is None and forced.right == [True] * 5
    one = force(model, prefill(model, prompt), greedy[:1])
    assert one.right == [True] and one.seconds == 0.0, "one token comes out of prefill"


def test_a_known_answer_has_the_cache_of_generate() -> None:
    """Layers with spans have rings; a copy of the rings continues from the first mistake."""
    model = llama()
    prompt = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(1))
    with patched(model, {"both": {"method": "streamingllm", "sink": 2, "window": 9}}):
        greedy = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, 40:].tolist()
        start = prefill(model, prompt[0].tolist(), answer=12)
        assert [(type(layer), layer.max_length) for layer in start.cache.layers] == [(RingLayer, 52)] * 3
        forced = force(model, start, [*greedy[:4], (greedy[4] + 1) % 90, 5], fork=True)
        assert forced.detour is not None
        assert continue_greedily(model, *forced.detour, 12, []) == greedy


def test_generation_stops_at_a_stop_token_or_the_limit() -> None:
    model = llama()
    start = prefill(model, [5, 6, 7])
    first = int(start.logits.argmax())
    free = continue_greedily(model, [first], start.cache, 6, [])
    assert len(free) == 6
    again = continue_greedily(model, [first], prefill(model, [5, 6, 7]).cache, 6, [free[3]])
    assert again == free[: free.index(free[3]) + 1]
    assert continue_greedily(model, [first], DynamicCache(), 6, [first]) == [first]


def test_the_tokens_of_an_answer_follow_the_prompt() -> None:
    for tokenizer in (byte_fallback_bpe(), unigram()):
        prompt = "The special magic number is"
        before, answer = encode(tokenizer, prompt, " 123")
        assert before == tokenizer(prompt)["input_ids"]
        assert before + answer == tokenizer(prompt + " 123")["input_ids"]
        _, merging = encode(tokenizer, "they are: ", "ABCDE")
        assert tokenizer.decode(merging).strip() == "ABCDE"


def test_context_and_stop_tokens() -> None:
    model = llama()
    check_context(model, 250, 6, "--lengths")
    with pytest.raises(
        TaskError, match=r"--lengths: a prompt of 250 tokens and 7 for .* context of 256; ask for at most 249"
    ):
        check_context(model, 250, 7, "--lengths")
    model.generation_config.eos_token_id = [7, 8]
    assert stop_tokens(model, byte_fallback_bpe()) == [7, 8, 1]


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(SparsePatchError, match="--model: no-such-model: cannot be loaded"):
        load_model("no-such-model")


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise AssertionError('code of a checkpoint ran')",)


DAMAGED: list[tuple[str, Callable[[Path], object], str]] = [
    (
        "pickle",
        lambda file: torch.save({"model.norm.weight": Payload()}, file.with_name("pytorch_model.bin")),
        "its weights are a pickle of more than tensors, which is never opened; save them as safetensors",
    ),
    (
        "old pickle",
        lambda file: file.with_name("pytorch_model.bin").write_bytes(pickle.dumps(Payload(), protocol=2)),
        "its weights are a pickle of more than tensors, which is never opened; save them as safetensors",
    ),
    ("no weights", lambda file: None, ""),
    ("cut", lambda file: file.write_bytes(b"\x08\0\0\0\0\0\0\0{"), ""),
    ("a header without end", lambda file: file.write_bytes(b"\xff" * 16), ""),
]


@pytest.mark.parametrize("damage, message", [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED])
def test_weights_that_cannot_be_loaded_are_one_line(
    damage: Callable[[Path], object], message: str, tmp_path: Path, needle_llama_path: Path
) -> None:
    """A pickle runs no code."""
    llama().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(needle_llama_path / name)
    (tmp_path / "model.safetensors").unlink()
    damage(tmp_path / "model.safetensors")
    with pytest.raises(SparsePatchError) as error:
        load_model(tmp_path)
    said = str(error.value)
    assert said.startswith(f"--model: {tmp_path}: cannot be loaded: {message}") and said.isprintable()
    assert len(said) <= 490 and "ran" not in said.split()
