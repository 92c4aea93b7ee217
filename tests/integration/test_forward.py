"""The phase of a forward depends on what `generate` is doing, not on the number of queries."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama
from method_table import CORRECTED, DECODE_METHODS, PREFILL_METHODS, configurations
from transformers import DynamicCache, PreTrainedModel, StaticCache

from sparse_patch import growing_cache, patched, sparsity_report
from sparse_patch.report import LayerReport

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 18
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False}
LOOKUP = {"prompt_lookup_num_tokens": 24}
PREFILL = [case.name for case in PREFILL_METHODS]
DECODE = [case.name for case in (*DECODE_METHODS, CORRECTED)]
A_SHAPE = {"method": "a_shape", "block_size": 16, "sink": 16, "window": 32, "min_length": 0}


def repeating(length: int = 200) -> torch.Tensor:
    """A prompt that repeats itself, so that candidates are found in it from the first forward on."""
    once = torch.randint(3, 90, (1, 50), generator=torch.Generator().manual_seed(3))
    return once.repeat(1, -(-length // 50))[:, :length]


@contextmanager
def widths(model: PreTrainedModel) -> Iterator[list[int]]:
    """How many tokens each forward in a `with` block reads."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


def queries(layer: LayerReport) -> tuple[float, float]:
    """Tokens that a layer read in prefill and in decode."""
    return layer.prefill.pairs[2], layer.decode.pairs[2]


def assisted(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """The answer of `generate` if 24 candidates are verified at a time. Checks that the prompt is read as one."""
    with widths(model) as seen:
        answer: torch.Tensor = model.generate(ids, **GREEDY, **options)  # type: ignore[operator]
    assert max(seen[1:]) > 16 and seen[0] > ids.shape[1], "the first forward has candidates, another one many"
    read = sum(seen)
    layer = sparsity_report(model).layers[3]  # every method is used there
    assert queries(layer) == (ids.shape[1], read - ids.shape[1]), "the prompt is prefill, the candidates decode"
    return answer


def assistant() -> dict[str, Any]:
    """Another model, which guesses wrong; it is asked for 24 tokens each time."""
    model = llama()
    model.generation_config.update(num_assistant_tokens=24, num_assistant_tokens_schedule="constant")
    model.generation_config.assistant_confidence_threshold = 0.0
    return {"assistant_model": model}


@pytest.mark.parametrize("name", [*PREFILL, "streamingllm", "moa", "duoattention"])
def test_candidates_are_decoded(name: str, plans: Path, five_layers: PreTrainedModel) -> None:
    """The text is the greedy text of the same patched model, however many tokens a forward verifies."""
    ids, config = repeating(), {**configurations(plans)[name], "on_unsupported": "error"}
    with patched(five_layers, config):
        expected = five_layers.generate(ids, **GREEDY)
    ways = [LOOKUP, assistant()] if name in ("a_shape", "spargeattn-topk", "moa") else [LOOKUP]
    for options in ways:
        with patched(five_layers, config):
            assert torch.equal(assisted(five_layers, ids, **options), expected), list(options)
            assert sparsity_report(five_layers).layers[3].prefill.sparse_calls == 1


@pytest.mark.parametrize("name", [*DECODE, "infllmv2"])
def test_a_full_budget_verifies_what_is_greedy(name: str, plans: Path, five_layers: PreTrainedModel) -> None:
    ids = repeating()
    expected = five_layers.generate(ids, **GREEDY)
    full = name.replace("tidaldecode", "tidaldecode-all") if name == CORRECTED.name else name
    with patched(five_layers, configurations(plans, full=True)[full]):
        assert torch.equal(assisted(five_layers, ids, **LOOKUP), expected)


@pytest.mark.parametrize("new", [1, 5, 16, 17])
@pytest.mark.parametrize("kind", [growing_cache, DynamicCache, StaticCache])
def test_a_new_turn_of_a_chat_is_prefill(kind: Any, new: int, five_layers: PreTrainedModel) -> None:
    """At any length; with a static cache, whose length the host does not know, only from 17 tokens on."""
    static = kind is StaticCache
    cache = kind(config=five_layers.config, max_cache_len=300) if static else kind(config=five_layers.config)
    options = {"past_key_values": cache, **GREEDY, "max_new_tokens": 3, "disable_compile": True}
    with patched(five_layers, {"prefill": A_SHAPE}):
        first = five_layers.generate(repeating(120), **options)
        before = sparsity_report(five_layers).layers[0]
        assert queries(before) == (120, 2)
        five_layers.generate(torch.cat([first, repeating(new)], 1), **options)
        after = sparsity_report(five_layers).layers[0]
    turn = new + 1  # the last token of the first answer was not read yet
    prefill = 0 if static and turn <= 16 else turn
    assert queries(after) == (120 + prefill, 2 + turn - prefill + 2)


def test_a_prompt_in_small_chunks_is_prefill(five_layers: PreTrainedModel) -> None:
    ids = repeating(100)
    with patched(five_layers, {"prefill": A_SHAPE}):
        five_layers.generate(ids, **{**GREEDY, "max_new_tokens": 3}, prefill_chunk_size=8)
        assert queries(sparsity_report(five_layers).layers[0]) == (100, 2)


def test_prompts_that_generate_gets_as_embeddings(five_layers: PreTrainedModel) -> None:
    ids = repeating(100)
    embedded = five_layers.get_input_embeddings()(ids)
    with patched(five_layers, {"prefill": A_SHAPE}):
        expected = five_layers.generate(ids, **GREEDY)[:, 100:]
        before = queries(sparsity_report(five_layers).layers[0])
        assert torch.equal(five_layers.generate(inputs_embeds=embedded, **GREEDY), expected)
        after = queries(sparsity_report(five_layers).layers[0])
    assert before == (100, NEW - 1) and after == (200, 2 * (NEW - 1))


def test_beams_decode_after_the_prompt(five_layers: PreTrainedModel) -> None:
    with patched(five_layers, {"prefill": A_SHAPE}):
        five_layers.generate(repeating(100), **{**GREEDY, "max_new_tokens": 5}, num_beams=3)
        prefill, decode = queries(sparsity_report(five_layers).layers[0])
    assert prefill in (100, 300) and decode == 3 * 4
