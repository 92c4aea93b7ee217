"""The growing cache against Transformers' cache, bit for bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import gemma3, gemma3n, gemma4, llama
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from sparse_patch import SparsePatchError, patched, span_cache, sparsity_report
from sparse_patch.integration.caches import layers as cache_layers
from sparse_patch.integration.caches.layers import GrowingLayer
from sparse_patch.integration.caches.lookup import kv_state_of
from sparse_patch.integration.caches.making import growing_cache
from sparse_patch.integration.caches.size import CacheBytes, cache_bytes
from sparse_patch.integration.forward import Forward
from sparse_patch.integration.hook import join_forward
from sparse_patch.integration.masks import LazyMask
from sparse_patch.integration.patch import state_of


@pytest.fixture(params=[llama, gemma3], ids=["llama", "gemma3"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    family: Callable[[], PreTrainedModel] = request.param
    return family()


@torch.no_grad()
def test_logits_are_those_of_a_dynamic_cache(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt, chunk and tokens, through several growths. A copy is independent."""
    monkeypatch.setattr(cache_layers, "SPARE", 3)
    ids = torch.randint(3, 90, (2, 80))
    growing, dynamic = growing_cache(model.config), DynamicCache(config=model.config)
    assert any(isinstance(layer, GrowingLayer) for layer in growing.layers)
    for begin, end in [(0, 30), (30, 41), *((i, i + 1) for i in range(41, 70))]:
        ours, theirs = (model(ids[:, begin:end], past_key_values=cache).logits for cache in (growing, dynamic))
        assert torch.equal(ours, theirs)
    fork = copy.deepcopy(growing)
    expected = model(ids[:, 70:75], past_key_values=copy.deepcopy(dynamic)).logits
    model(ids[:, 3:9], past_key_values=growing)
    assert torch.equal(model(ids[:, 70:75], past_key_values=fork).logits, expected)


@torch.no_grad()
def test_tokens_are_appended_in_place() -> None:
    model = llama()
    cache = growing_cache(model.config)
    model(torch.randint(3, 90, (1, 40)), past_key_values=cache)
    before = cache.layers[0].keys.data_ptr()
    for _ in range(20):
        model(torch.tensor([[7]]), past_key_values=cache)
    assert cache.layers[0].keys.data_ptr() == before and cache.get_seq_length() == 60


@torch.no_grad()
def test_cropping_and_reordering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_layers, "SPARE", 8)
    model = llama()
    ids = torch.randint(3, 90, (2, 40))
    results = []
    for cache in (growing_cache(model.config), DynamicCache(config=model.config)):
        model(ids[:, :30], past_key_values=cache)
        cache.crop(-5)
        model(ids[:, 30:33], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        model(ids[:, 33:34], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        results.append(model(ids[:, 34:36].repeat_interleave(2, 0), past_key_values=cache).logits)
    assert torch.equal(*results)


@torch.no_grad()
def test_bytes_of_layers_that_keep_everything(model: PreTrainedModel) -> None:
    """`planned` is what is kept, including sliding windows; the room to grow is only in `allocated`."""
    ids, kept = torch.randint(3, 90, (2, 40)), 0
    cache = growing_cache(model.config)
    assert cache_bytes(cache) == CacheBytes(0, 0, 0)
    model(ids, past_key_values=cache)
    for layer in cache.layers:
        kept += layer.keys.nbytes + layer.values.nbytes
    found = cache_bytes(cache)
    assert found.planned == found.dense == kept < found.allocated
    model(ids, past_key_values=(copying := DynamicCache(config=model.config)))
    assert cache_bytes(copying).planned == kept


def test_generate_takes_it(model: PreTrainedModel) -> None:
    ids = torch.randint(3, 90, (2, 20))
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, past_key_values=growing_cache(model.config), **settings), expected)


@pytest.mark.parametrize("build", [gemma3n, gemma4])
def test_layers_that_share_keys_share_what_is_kept_of_them(build: Callable[[], PreTrainedModel]) -> None:
    """The answers are those of a cache without `KVState`, which makes page statistics anew for every token."""
    model = build()
    ids = torch.randint(3, 90, (1, 130), generator=torch.Generator().manual_seed(2))
    quest = {"method": "quest", "budget": 48, "page_size": 8, "min_length": 0}
    logits = []
    with patched(model, {"decode": quest}), torch.no_grad():
        for cache in (growing_cache(model.config), DynamicCache(config=model.config)):
            steps = [model(part, past_key_values=cache).logits for part in ids.split([120, *[1] * 10], 1)]
            logits.append(torch.cat(steps, 1))
            last = model.get_submodule(sparsity_report(model).layers[5].name)
            mask = LazyMask({}, Forward())
            join_forward(last, (), {"past_key_values": cache, "attention_mask": mask})
            kv_state = kv_state_of(mask.forward.cache, state_of(last).cache_layer)
            assert kv_state is getattr(cache.layers[3], "kv_state", None)
        assert [sparsity_report(model).layers[i].decode.sparse_calls for i in (3, 5)] == [20, 20]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_bytes_of_an_encoder_decoder_cache_are_those_of_the_decoder(model: PreTrainedModel) -> None:
    cache = growing_cache(model.config)
    with torch.no_grad():
        model(torch.randint(3, 90, (1, 20)), past_key_values=cache)
    both = EncoderDecoderCache(cache, DynamicCache())
    assert cache_bytes(both) == cache_bytes(cache) != CacheBytes(0, 0, 0)


def test_what_is_no_cache_no_config_and_no_length_is_said_in_one_line(model: PreTrainedModel) -> None:
    for wrong in (None, model, "cache"):
        with pytest.raises(SparsePatchError, match=r"^cache_bytes: cache: expected a Cache of Transformers, got .+"):
            cache_bytes(wrong)  # type: ignore[arg-type]
        with pytest.raises(SparsePatchError, match=r"^growing_cache: config: expected model.config, got .+"):
            growing_cache(wrong)  # type: ignore[arg-type]
    for length in (None, "x", 0, -1, 1.5):
        with pytest.raises(SparsePatchError, match=r"^span_cache: max_length: expected a number of tokens above 0"):
            span_cache(model, length)  # type: ignore[arg-type]


def test_chunks_for_a_static_cache_are_sparse_and_only_tokens_are_compiled(
    five_layers: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where `generate` compiles what it calls with a static cache."""
    ids, compiled = torch.randint(3, 90, (2, 100)), []

    def compiled_call(self: PreTrainedModel, config: Any) -> Any:
        def call(**kwargs: Any) -> Any:
            compiled.append(kwargs["input_ids"].shape[1])
            return self(**kwargs)

        return call

    monkeypatch.setattr(type(five_layers), "get_compiled_call", compiled_call)
    monkeypatch.setattr(type(five_layers), "_valid_auto_compile_criteria", lambda *args: True)
    options = {"max_new_tokens": 5, "do_sample": False, "prefill_chunk_size": 40, "cache_implementation": "static"}
    config = {"prefill": {"method": "a_shape", "block_size": 16, "sink": 16, "window": 16, "min_length": 0}}
    with patched(five_layers, config):
        found = five_layers.generate(ids, **options)
        report = sparsity_report(five_layers)
        assert compiled == [1] * 4
        assert report.layers[0].prefill.sparse_calls == 3
        expected = five_layers.generate(ids, **{**options, "cache_implementation": None})
    assert torch.equal(found, expected)
    assert "get_compiled_call" not in vars(five_layers)
