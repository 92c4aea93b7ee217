"""Models with methods with spans, against a model whose heads attend under their own masks, on a whole cache."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.reports import counted_in_graphs
from builders.spans import (
    LENGTH,
    NEW,
    RULES,
    batch_of,
    by_mask,
    close,
    current_spans,
    fed,
    full_layers,
    generated,
    moa,
    moa_spans,
    rules_of,
    shape_of,
)
from families import FAMILIES, gemma3, llama, qwen3
from oracles.span_oracle import spans_by_mask
from transformers import CompileConfig, DynamicCache, PreTrainedModel

from sparse_patch import patch_model, patched, reset_report, span_cache, sparsity_report, unpatch_model
from sparse_patch.artefacts.head_schedules import duo_schedules
from sparse_patch.integration.caches.rings import FixedRingLayer, RingLayer


@pytest.fixture(params=[llama, qwen3, gemma3], ids=lambda family: family.__name__)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    built: PreTrainedModel = request.param()
    return built


def test_generate_is_the_oracles(model: PreTrainedModel, tmp_path: Path) -> None:
    """Greedy, with left padding, in one piece and in chunks."""
    batch = batch_of()
    length = LENGTH + NEW - 1
    with patched(model, moa(tmp_path, model)):
        for options in ({}, {"prefill_chunk_size": 13}):
            result = generated(model, batch, **options)
            mask = torch.cat([batch["attention_mask"], torch.ones(2, NEW, dtype=torch.int64)], 1)
            whole = {"input_ids": result.sequences, "attention_mask": mask}
            kinds = [type(layer) for layer in result.past_key_values.layers]
            assert [kinds.index(RingLayer), kinds.count(RingLayer)] == [full_layers(model)[0], len(full_layers(model))]
            found = torch.stack(result.logits, 1)
            unpatch_model(model)
            close(found, by_mask(model, whole, moa_spans(model, length))[:, LENGTH - 1 : -1])
            assert not torch.allclose(found, by_mask(model, whole, {})[:, LENGTH - 1 : -1], atol=0.1), "it was sparse"
            patch_model(model, moa(tmp_path, model))
        assert sparsity_report(model).fallbacks() == {}


SPLITS = [[100], [70, 30], [1] * 100, [33, 1, 1, 20, 2, 1, 42], [3, 1, 96], [35, 35, *[1] * 30], [64, 17, 19]]


@pytest.mark.parametrize("policy", ["total", "current"])
@pytest.mark.parametrize("pad", [0, 9, 40])
def test_any_split_is_the_oracles(model: PreTrainedModel, pad: int, policy: str, tmp_path: Path) -> None:
    """Pieces of any size, also if a row begins after the first pieces. The ring of a full head never turns over."""
    batch = batch_of(100, pad)
    expected = by_mask(model, batch, moa_spans(model, 120) if policy == "total" else current_spans(model))
    rules = rules_of(model).model_copy(update={"length_policy": policy})
    with patched(model, moa(tmp_path, model, rules)):
        for pieces in SPLITS:
            if pad < pieces[0]:
                close(fed(model, batch, pieces, span_cache(model, 120)), expected, batch["attention_mask"])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_windows_of_the_own_prefix_do_not_depend_on_the_answer(cache: str, tmp_path: Path) -> None:
    """`length_policy: current`: the first tokens of a long answer are those of a short one, and those of the oracle."""
    model, batch = llama(), batch_of()
    rules = rules_of(model).model_copy(update={"length_policy": "current"})
    with patched(model, moa(tmp_path, model, rules)):
        short, long = (generated(model, batch, new, cache_implementation=cache) for new in (10, 60))
        kept = [layer.keys.shape[1] for layer in long.past_key_values.layers]
    assert kept == [sum(min(rules.room(*rule, 129), 130) for rule in RULES[layer]) for layer in range(3)]
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 60, dtype=torch.int64)], 1)
    expected = by_mask(model, {"input_ids": long.sequences, "attention_mask": mask}, current_spans(model))
    close(torch.stack(long.logits, 1), expected[:, LENGTH - 1 : -1])
    close(torch.stack(short.logits), torch.stack(long.logits[:10]))


def test_the_other_methods(model: PreTrainedModel, tmp_path: Path) -> None:
    """StreamingLLM, and DuoAttention with every second head full, are uniform masks."""
    batch, heads = batch_of(100), model.config.num_key_value_heads
    streaming = {"method": "streamingllm", "sink": 5, "window": 21}
    (tmp_path / "gates.tsv").write_text("\n".join("\t".join(["0.9", "0.1"][:heads]) for _ in range(3)))
    gates = {"calibration": str(tmp_path / "gates.tsv"), "sink": 4, "window": 124, "sparsity": 0.5 if heads == 2 else 1}
    for both, spans in (
        (streaming, [(5, 21)] * heads),
        ({"method": "duoattention", **gates}, [(0, 1000), (4, 124)] if heads == 2 else [(4, 124)]),
    ):
        expected = by_mask(model, batch, {layer: spans for layer in full_layers(model)})
        with patched(model, {"both": both}):
            for pieces in ([80, *[1] * 20], [31, 50, 19]):
                close(fed(model, batch, pieces, span_cache(model, 100)), expected, batch["attention_mask"])


def test_a_dense_prompt_and_sparse_answers() -> None:
    """With only `decode`, the prompt is dense and each token after it reads by the spans."""
    model, batch = llama(), batch_of()
    spans = {layer: [(5, 21)] * 2 for layer in range(3)}
    cache = DynamicCache(config=model.config)
    fed(model, batch, [LENGTH - 10], cache)
    with spans_by_mask(model, spans):
        expected = fed(model, batch, [1] * 10, cache, LENGTH - 10)
    with patched(model, {"decode": {"method": "streamingllm", "sink": 5, "window": 21}}):
        found = fed(model, batch, [LENGTH - 10, *[1] * 10], span_cache(model, 100))
    close(found[:, -10:], expected)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_beams_and_samples(model: PreTrainedModel, options: dict[str, Any], tmp_path: Path) -> None:
    batch = batch_of()
    torch.manual_seed(3)
    with patched(model, moa(tmp_path, model)):
        found = generated(model, batch, **options)
    torch.manual_seed(3)
    with spans_by_mask(model, moa_spans(model, LENGTH + NEW - 1)):
        expected = generated(model, batch, **options)
    assert torch.equal(found.sequences, expected.sequences)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama", "qwen3", "gemma3"}))
def test_other_families(family: str) -> None:
    """The cache of `generate` gives what a cache of all keys gives; only heads with their own keys have rings."""
    model, batch = FAMILIES[family](), batch_of()
    with patched(model, {"both": {"method": "streamingllm", "sink": 4, "window": 17}, "on_unsupported": "error"}):
        found = generated(model, batch, 8)
        expected = generated(model, batch, 8, past_key_values=DynamicCache(config=model.config))
    close(torch.stack(found.logits), torch.stack(expected.logits))
    rings = sum(isinstance(layer, RingLayer) for layer in found.past_key_values.layers)
    assert rings == (0 if family in ("gemma4", "minicpm3") else len(full_layers(model)))


@pytest.mark.parametrize("pad", [0, 9])
def test_a_static_cache_and_its_compiled_step(model: PreTrainedModel, pad: int, tmp_path: Path) -> None:
    """Only the device knows the length of the rings; the step is one graph without a break."""
    torch._dynamo.reset()
    batch = batch_of(pad=pad)
    options = CompileConfig(backend="eager", fullgraph=True)
    options._compile_all_devices = True
    with patched(model, moa(tmp_path, model)):
        expected = torch.stack(generated(model, batch).logits)
        result = generated(model, batch, cache_implementation="static")
        assert sum(isinstance(layer, FixedRingLayer) for layer in result.past_key_values.layers) == len(
            full_layers(model)
        )
        close(torch.stack(result.logits), expected)
        before = sparsity_report(model)
        assert before.layers[-1].decode.sparse_calls == 2 * (NEW - 1) and before.fallbacks() == {}
        assert before.layers[-1].decode.keeping_calls == 0 and before.layers[-1].decode.attended < 40
        reset_report(model)
        generated(model, batch, cache_implementation="static")
        before = sparsity_report(model)
        reset_report(model)
        compiled = generated(model, batch, cache_implementation="static", compile_config=options)
        after = sparsity_report(model)
        assert after.layers[-1].compiled and counted_in_graphs(after) == before.layers
        close(torch.stack(compiled.logits), expected)
        beams = generated(model, batch, 6, cache_implementation="static", num_beams=2)
        assert beams.sequences.shape == (2, LENGTH + 6)
    torch._dynamo.reset()


def longer(batch: dict[str, torch.Tensor], sequences: torch.Tensor, more: int) -> dict[str, torch.Tensor]:
    """A prompt that continues what was generated."""
    ids = torch.cat([sequences, sequences[:, :more].flip(1)], 1)
    mask = torch.ones_like(ids)
    mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask}


def test_a_chat_goes_on_within_its_length(model: PreTrainedModel, tmp_path: Path) -> None:
    batch = batch_of()
    with patched(model, moa(tmp_path, model)):
        cache = span_cache(model, 200)
        first = generated(model, batch, 8, past_key_values=cache)
        second = generated(model, longer(batch, first.sequences, 20), 8, past_key_values=cache)
    whole = longer(batch, second.sequences, 0)
    expected = by_mask(model, whole, moa_spans(model, 200))
    close(torch.stack(second.logits, 1), expected[:, -9:-1])
    close(torch.stack(first.logits, 1), expected[:, LENGTH - 1 : LENGTH + 7])


def test_a_chat_goes_on_on_a_static_cache(tmp_path: Path) -> None:
    """Only the device knows how many tokens were seen. After a reset the cache serves another text."""
    model, batch = llama(), batch_of()
    with patched(model, moa(tmp_path, model)):
        first = generated(model, batch, 50, cache_implementation="static")
        cache = first.past_key_values
        cache.reset()
        assert int(cache.get_seq_length()) == 0
        first = generated(model, batch, 8, past_key_values=cache)
        second = generated(model, longer(batch, first.sequences, 20), 8, past_key_values=cache)
    expected = by_mask(model, longer(batch, second.sequences, 0), moa_spans(model, LENGTH + 49))
    close(torch.stack(second.logits, 1), expected[:, -9:-1])
    close(torch.stack(first.logits, 1), expected[:, LENGTH - 1 : LENGTH + 7])


@pytest.mark.parametrize("by_generate", [True, False])
def test_a_chat_outgrows_its_length(by_generate: bool, tmp_path: Path) -> None:
    """Heads that still have everything get the span of the new length; the other heads keep theirs."""
    model, batch = llama(), batch_of()
    with patched(model, moa(tmp_path, model)):
        cache = span_cache(model, LENGTH + 7)
        first = generated(model, batch, 8, past_key_values=cache)
        whole = longer(batch, first.sequences, 40)
        if by_generate:
            last = generated(model, whole, 1, past_key_values=cache).logits[0][:, None]
            total = LENGTH + 8 + 40
        else:
            last = fed(model, whole, [41], cache, LENGTH + 7)
            total = (LENGTH + 48) + 256 + (LENGTH + 48) // 8
        assert [layer.max_length for layer in cache.layers] == ([total] * 3 if by_generate else [total, *[77] * 2])
    before, after = (moa_spans(model, length) for length in (LENGTH + 7, total))
    mixed = {
        layer: [now if sum(was) >= LENGTH + 7 else was for was, now in zip(before[layer], after[layer], strict=True)]
        for layer in before
    }
    assert mixed != before and mixed != after
    oracles = DynamicCache(config=model.config)
    with spans_by_mask(model, before):
        fed(model, whole, [LENGTH + 7], oracles)
    with spans_by_mask(model, mixed):
        expected = fed(model, whole, [41], oracles, LENGTH + 7)
    close(last, expected[:, -last.shape[1] :])


def test_spans_that_reach_everywhere_are_dense(model: PreTrainedModel, tmp_path: Path) -> None:
    batch, heads = batch_of(), model.config.num_key_value_heads
    dense = generated(model, batch)
    every = duo_schedules(shape_of(model), {(layer, head) for layer in range(3) for head in range(heads)})
    for config in (moa(tmp_path, model, every), {"both": {"method": "streamingllm", "window": 1000}}):
        with patched(model, config):
            result = generated(model, batch)
            report = sparsity_report(model)
        assert torch.equal(result.sequences, dense.sequences)
        close(torch.stack(result.logits), torch.stack(dense.logits))
        for layer in full_layers(model):
            assert report.layers[layer].prefill.density == report.layers[layer].decode.density == 1
    with patched(model, {"both": {"method": "streamingllm", "window": 1000, "layers": []}}):
        assert torch.equal(torch.stack(generated(model, batch).logits), torch.stack(dense.logits))


def test_patching_leaves_weights_and_model_as_they_were(tmp_path: Path) -> None:
    def digest() -> str:
        return hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in model.state_dict().values())).hexdigest()

    model, batch = llama(), batch_of()
    weights, dense = digest(), generated(model, batch)
    with patched(model, moa(tmp_path, model)):
        generated(model, batch)
    assert digest() == weights
    again = generated(model, batch)
    assert torch.equal(torch.stack(again.logits), torch.stack(dense.logits))
    assert not any(isinstance(layer, RingLayer) for layer in again.past_key_values.layers)
