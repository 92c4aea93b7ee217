"""The rings of a span cache: what they hold, how they are handled, what they cost and what they cannot do."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.spans import LENGTH, NEW, batch_of, by_mask, close, fed, generated, moa, moa_spans, rules_of
from families import llama
from oracles.span_oracle import spans_by_mask
from transformers import DynamicCache

from sparse_patch import (
    UnsupportedCallError,
    cache_bytes,
    growing_cache,
    load_config,
    patched,
    span_cache,
    sparsity_report,
)
from sparse_patch.cli.inspection import KVBytes, inspect
from sparse_patch.integration.caches.layers import GrowingLayer
from sparse_patch.integration.caches.rings import RingLayer


@pytest.mark.parametrize("pad", [0, 9])
def test_the_ring_holds_what_the_spans_have(pad: int, tmp_path: Path) -> None:
    """After every step the ring holds the first tokens and the last ones, each in its slot, and nothing else."""
    model, batch = llama(), batch_of(pad=pad)
    everything = DynamicCache(config=model.config)
    with spans_by_mask(model, moa_spans(model, LENGTH)):
        fed(model, batch, [LENGTH], everything)
    seen = 0
    with patched(model, moa(tmp_path, model)):
        cache = span_cache(model, LENGTH)
        for piece in (10, 7, 1, 1, 20, 1, 1, 1, 1, 27):
            fed(model, batch, [piece], cache, seen)
            seen += piece
            assert cache.get_seq_length() == seen and cache.get_mask_sizes(3, 0) == (seen + 3, 0)
            for layer, full in zip(cache.layers, everything.layers, strict=True):
                check_ring(layer, full, [0, pad], seen)


def check_ring(layer: Any, full: Any, starts: list[int], seen: int) -> None:
    begin = 0
    for head, ((sink, window), slots) in enumerate(zip(layer.layout.spans, layer.layout.capacities, strict=True)):
        for row, start in enumerate(starts):
            tokens = max(seen - start, 0)
            held = set(range(tokens)) if window is None else {*range(min(sink, tokens)), *range(tokens)[-window:]}
            turn = slots - sink
            slot_of = {p: p if p < sink else sink + (p - sink) % turn for p in held}
            assert len(set(slot_of.values())) == len(held) <= slots
            for kept, whole in ((layer.keys, full.keys), (layer.values, full.values)):
                for position, slot in slot_of.items():
                    close(kept[row, begin + slot], whole[row, head, start + position])
                free = [begin + slot for slot in range(slots) if slot not in slot_of.values()]
                assert kept[row, free].eq(0).all(), "a slot without a token"
        begin += slots
    assert begin == layer.keys.shape[1]


@pytest.mark.parametrize("length", [7, 8, 9, 2, 3, 4, 15, 16, 17])
def test_a_ring_around_its_turns(length: int) -> None:
    """Prompts are about as long as the sink, the span and two spans; single tokens follow."""
    model, batch = llama(), batch_of(40, pad=0)
    expected = by_mask(model, batch, {layer: [(3, 5)] * 2 for layer in range(3)})
    with patched(model, {"both": {"method": "streamingllm", "sink": 3, "window": 5}}):
        close(fed(model, batch, [length, *[1] * 20], span_cache(model, 40)), expected[:, : length + 20])


def test_interleaved_texts_do_not_meet(tmp_path: Path) -> None:
    model = llama()
    batches = [batch_of(100, pad) for pad in (0, 20)]
    with patched(model, moa(tmp_path, model)):
        alone = [fed(model, batch, [60, *[1] * 40], span_cache(model, 100)) for batch in batches]
        caches = [span_cache(model, 100) for _ in batches]
        woven: list[list[torch.Tensor]] = [[], []]
        for begin, piece in [(0, 60), *((i, 1) for i in range(60, 100))]:
            for batch, cache, logits in zip(batches, caches, woven, strict=True):
                logits.append(fed(model, batch, [piece], cache, begin))
    for expected, logits in zip(alone, woven, strict=True):
        assert torch.equal(torch.cat(logits, 1), expected)


def test_a_copy_of_a_cache_goes_its_own_way(tmp_path: Path) -> None:
    model, batch = llama(), batch_of(100)
    with patched(model, moa(tmp_path, model)):
        cache = span_cache(model, 100)
        fed(model, batch, [60], cache)
        fork = copy.deepcopy(cache)
        expected = fed(model, batch, [1] * 40, cache, 60)
        assert torch.equal(fed(model, batch, [1] * 40, fork, 60), expected)


@torch.no_grad()
def test_rows_of_the_batch_change(tmp_path: Path) -> None:
    model, batch = llama(), batch_of(60)
    rows = torch.tensor([1, 1, 0])
    changed = {key: value[rows] for key, value in batch.items()}
    with patched(model, moa(tmp_path, model)):
        expected = fed(model, changed, [50, *[1] * 10], span_cache(model, 60))[:, 50:]
        cache = span_cache(model, 60)
        cache.batch_repeat_interleave(2)  # nothing is there yet
        fed(model, batch, [50], cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 1, 3]))
        close(fed(model, changed, [1] * 10, cache, 50), expected)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache_bytes(cache).allocated == 0
        close(fed(model, changed, [50, *[1] * 10], cache)[:, 50:], expected)


def test_bytes_are_those_of_the_plan_and_known_beforehand(tmp_path: Path) -> None:
    model = llama()
    with patched(model, moa(tmp_path, model)):
        result = generated(model, batch_of())
    length, found = LENGTH + NEW - 1, cache_bytes(result.past_key_values)
    token = 2 * 2 * 16 * 4  # keys and values of two rows, float32
    kept = [min(tokens, length) for layer in range(3) for tokens in rules_of(model).kept(layer, length)]
    assert found.allocated == found.planned == token * sum(kept) < 0.5 * found.dense
    assert found.dense == token * 6 * length
    model.save_pretrained(tmp_path / "model")
    layers, kv = inspect(tmp_path / "model", load_config(moa(tmp_path, model)), length)
    assert len(layers) == 3 and kv == KVBytes(length, found.planned // 2, found.dense // 2)
    assert inspect(tmp_path / "model", load_config("flexprefill"), length)[1] is None


def test_nothing_else_holds_keys_or_values() -> None:
    def large() -> set[int]:
        """Tensors as large as the keys of a layer."""
        gc.collect()
        return {id(item) for item in gc.get_objects() if type(item) is torch.Tensor and item.nbytes >= size}

    model, batch = llama(), batch_of(200, pad=0, rows=4)
    size = 4 * 2 * 200 * 16 * 4
    with patched(model, {"both": {"method": "streamingllm", "sink": 2, "window": 8}}), torch.no_grad():
        before = large()
        cache = span_cache(model, 220)
        for piece in (batch["input_ids"], batch["input_ids"][:, :1]):
            model(piece, past_key_values=cache, logits_to_keep=1)
            assert large() == before
        assert all(layer.keys.untyped_storage().nbytes() < size for layer in cache.layers)


def test_layers_and_caches_that_keep_everything(tmp_path: Path) -> None:
    """Layers that are not selected grow. A user's own cache gives right answers, and the report names its cost."""
    model, batch = llama(), batch_of()
    with patched(model, moa(tmp_path, model, layers=[1], max_length=LENGTH + NEW - 1)):
        expected = generated(model, batch)
        kinds = [type(layer) for layer in expected.past_key_values.layers]
        assert kinds == [GrowingLayer, RingLayer, GrowingLayer]
        assert not any("saves no memory" in note for note in sparsity_report(model).notes())
        for options in (
            {"past_key_values": DynamicCache(config=model.config)},
            {"past_key_values": growing_cache(model.config)},
        ):
            found = generated(model, batch, **options)
            close(torch.stack(found.logits), torch.stack(expected.logits))
        report = sparsity_report(model)
    assert report.layers[1].decode.keeping_calls == 2 * (NEW - 1) and report.fallbacks() == {}
    assert any(note.startswith("decode: 58 calls read by spans from a cache that keeps all") for note in report.notes())


def test_assisted_decoding_keeps_everything(tmp_path: Path) -> None:
    model = llama()
    prompt = {"input_ids": batch_of(pad=0)["input_ids"][:1]}
    with patched(model, moa(tmp_path, model, max_length=LENGTH + 11)):
        expected = generated(model, prompt, 12, past_key_values=growing_cache(model.config))
        found = generated(model, prompt, 12, assistant_model=llama())
    assert torch.equal(found.sequences, expected.sequences)


def raised(message: str, action: Callable[[], Any]) -> None:
    with pytest.raises(UnsupportedCallError, match=message) as error:
        action()
    assert "\n" not in str(error.value) and "past_key_values=growing_cache(model.config)" in str(error.value)


@torch.no_grad()
def test_what_a_ring_cannot_serve_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model, batch = llama(), batch_of(60, pad=0)
    ids, holes = batch["input_ids"], torch.ones(2, 41, dtype=torch.int64)
    holes[0, 20] = 0
    with patched(model, {**moa(tmp_path, model), "on_unsupported": "silent"}):
        expected = fed(model, batch, [40, 1], span_cache(model, 60))[:, -1:]
        model(ids[:, :40], past_key_values=(cache := span_cache(model, 60)), output_attentions=True)
        assert sparsity_report(model).fallbacks() == {"output_attentions": 3}, "dense while all keys are there"
        model(ids[:, 40:41], past_key_values=cache)
        fed(model, batch, [40], cache := span_cache(model, 60))
        raised(
            "decode: output_attentions: not served by a span cache, which has forgotten",
            lambda: model(ids[:, 40:41], past_key_values=cache, output_attentions=True),
        )
        raised(
            "decode: padding that is not on the left",
            lambda: model(ids[:, 40:41], past_key_values=cache, attention_mask=holes),
        )
        raised(r"cannot take tokens back \(crop\)", lambda: cache.crop(-3))
        cache.crop(0)
        with torch.enable_grad():
            raised("gradients are needed", lambda: model(ids[:, 40:41], past_key_values=cache))
        assert torch.equal(fed(model, batch, [1], cache, 40), expected)


@torch.no_grad()
def test_a_prompt_that_no_ring_serves_is_kept_whole(tmp_path: Path) -> None:
    """Padding on the right: prompt and next token are those of the unpatched model, and the reason is counted."""
    model, ids = llama(), batch_of(60, pad=0)["input_ids"]
    masks = [torch.ones(2, 60, dtype=torch.int64), torch.ones(2, 61, dtype=torch.int64)]
    for mask in masks:
        mask[0, 50:60] = 0

    def logits(cache: DynamicCache) -> list[torch.Tensor]:
        parts = zip((ids, ids[:, :1]), masks, strict=True)
        return [model(part, attention_mask=mask, past_key_values=cache).logits for part, mask in parts]

    expected = logits(DynamicCache(config=model.config))
    with patched(model, {**moa(tmp_path, model), "on_unsupported": "silent"}):
        cache = span_cache(model, 80)
        torch.testing.assert_close(logits(cache), expected)
        assert all(isinstance(layer, GrowingLayer) for layer in cache.layers)
        assert sparsity_report(model).fallbacks("decode") == {"padding that is not on the left": len(cache.layers)}


@torch.no_grad()
def test_a_cache_of_a_model_that_is_not_patched_any_more(tmp_path: Path) -> None:
    model, ids = llama(), batch_of(60, pad=0)["input_ids"]
    with patched(model, moa(tmp_path, model)):
        cache = span_cache(model, 80)
    with pytest.raises(UnsupportedCallError, match="start again with a new cache"):
        model(ids, past_key_values=cache)
