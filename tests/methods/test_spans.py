"""Methods of spans and the ring cache: against a model whose heads attend under their own masks, on a whole cache."""

import copy
import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import make_call, row_alone
from families import FAMILIES, gemma3, llama, qwen3
from method_table import SMALL_MODEL, SPAN_METHODS, MethodCase, write_plans
from span_oracle import Spans, moa_current_window, moa_window, spans_by_mask
from transformers import CompileConfig, DynamicCache, PreTrainedModel

from sparse_patch import (
    ConfigError,
    UnsupportedCallError,
    cache_bytes,
    capture_plans,
    growing_cache,
    load_config,
    patch_model,
    patched,
    span_cache,
    sparsity_report,
    unpatch_model,
)
from sparse_patch.cache_layers import GrowingLayer
from sparse_patch.inspection import KVBytes, inspect
from sparse_patch.methods.base import registry
from sparse_patch.methods.span_plans import SpanRules, duo_rules, write_span_rules
from sparse_patch.methods.spans import SpanMethod
from sparse_patch.model_shape import ModelShape
from sparse_patch.ops.span import attend
from sparse_patch.plans import Dense, GrowingWindow, SpanPlan, Window
from sparse_patch.rings import FixedRingLayer, RingLayer

LENGTH, NEW = 70, 30  # with windows of 5 to 35 tokens, rings turn in the prompt and in the answer
SIZES = {"sink": 3, "block": 4, "min_span": 8}
RULES = [[(0, 1), (12, 0)], [(8, 0.25), (0, 0.1)], [(30, 0), (8, 0)]]  # alpha and beta of layers and KV heads


@pytest.fixture(params=[llama, qwen3, gemma3], ids=lambda family: family.__name__)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    built: PreTrainedModel = request.param()
    return built


def shape_of(model: PreTrainedModel) -> ModelShape:
    return ModelShape.of(model.config, model.config.num_hidden_layers)


def full_layers(model: PreTrainedModel) -> list[int]:
    return sorted(set(range(model.config.num_hidden_layers)) - shape_of(model).local_layers)


def rules_of(model: PreTrainedModel) -> SpanRules:
    heads = model.config.num_key_value_heads
    alphas, betas = ([[rule[part] for rule in row[:heads]] for row in RULES] for part in (0, 1))
    return SpanRules.of(shape_of(model), alphas, betas, **SIZES)


def moa(folder: Path, model: PreTrainedModel, rules: SpanRules | None = None, **settings: Any) -> dict[str, Any]:
    """A configuration with a plan that is written to the folder."""
    write_span_rules(folder / "plan.json", rules or rules_of(model))
    both = {"method": "moa", "calibration": str(folder / "plan.json"), **settings}
    return {"both": both, "on_unsupported": "error"}


def moa_spans(model: PreTrainedModel, length: int) -> dict[int, Spans]:
    """What the plan means at a total length, by the formula."""
    heads = model.config.num_key_value_heads
    return {
        layer: [(SIZES["sink"], moa_window(*rule, length, **SIZES)) for rule in RULES[layer][:heads]]
        for layer in full_layers(model)
    }


def current_spans(model: PreTrainedModel) -> dict[int, Spans]:
    """What the plan means where the length is that of a query's own prefix."""
    heads, sink, least = model.config.num_key_value_heads, SIZES["sink"], SIZES["min_span"]
    return {
        layer: [(sink, moa_current_window(*rule, sink, least)) for rule in RULES[layer][:heads]]
        for layer in full_layers(model)
    }


def batch_of(length: int = LENGTH, pad: int = 9, rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[-1, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: PreTrainedModel, batch: dict[str, torch.Tensor], new: int = NEW, **options: Any) -> Any:
    settings: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **options}
    return model.generate(**batch, max_new_tokens=new, **settings)  # type: ignore[operator]


@torch.no_grad()
def fed(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], pieces: Sequence[int], cache: Any, begin: int = 0
) -> torch.Tensor:
    """Logits of a batch that is fed in pieces, from token `begin` on."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = []
    for piece in pieces:
        now = slice(begin, begin + piece)
        inputs = {"input_ids": ids[:, now], "attention_mask": mask[:, : now.stop], "position_ids": positions[:, now]}
        logits.append(model(**inputs, past_key_values=cache).logits)
        begin += piece
    return torch.cat(logits, 1)


def by_mask(model: PreTrainedModel, batch: dict[str, torch.Tensor], spans: dict[int, Spans]) -> torch.Tensor:
    """Logits of one forward of the oracle."""
    with spans_by_mask(model, spans):
        return fed(model, batch, [batch["input_ids"].shape[1]], DynamicCache(config=model.config))


def close(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    if mask is not None:
        found, expected = found[mask.bool()], expected[mask.bool()]
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-4)


# What a method decides.


def build(settings: dict[str, Any], folder: Path) -> SpanMethod:
    write_plans(folder, SMALL_MODEL)
    files = {"calibration": str(folder / settings["calibration"])} if "calibration" in settings else {}
    method = registry()[settings["method"]].model_validate({**settings, **files})
    resolved = method.for_model(SMALL_MODEL)
    assert isinstance(resolved, SpanMethod)
    return resolved


CASES = pytest.mark.parametrize("case", SPAN_METHODS, ids=lambda case: case.name)


def test_every_method_of_spans_is_in_the_table() -> None:
    assert {case.small["method"] for case in SPAN_METHODS} == {
        name for name, method in registry().items() if issubclass(method, SpanMethod)
    }


@CASES
@pytest.mark.parametrize("queries", [400, 150, 1])
def test_a_padded_row_and_grouped_heads(case: MethodCase, queries: int, tmp_path: Path) -> None:
    method = build(case.small, tmp_path)
    batch = make_call(400, queries=queries, row_starts=[0, 7, 130], value_dim=24)
    plan = method.plan(batch)
    assert isinstance(plan, SpanPlan) and plan.density().mean() < 0.9
    output, _ = attend(batch, plan)
    for row in range(3):
        alone, real = row_alone(batch, row)
        of_row = SpanPlan.of(alone, plan.sinks, plan.windows)
        start = int(batch.kv_start[row])  # type: ignore[index]
        assert torch.equal(plan.mask()[row, :, real, start:], of_row.mask()[0])
        torch.testing.assert_close(output[row : row + 1, :, real], attend(alone, of_row)[0], atol=2e-6, rtol=1e-5)


@CASES
def test_the_whole_prompt_and_its_last_chunk_agree(case: MethodCase, tmp_path: Path) -> None:
    method = build(case.small, tmp_path)
    whole, chunk = (method.plan(make_call(400, queries=queries)) for queries in (400, 77))
    assert isinstance(whole, SpanPlan) and isinstance(chunk, SpanPlan)
    assert torch.equal(whole.mask()[:, :, -77:], chunk.mask())


@CASES
def test_full_settings_and_short_calls_are_dense(case: MethodCase, tmp_path: Path) -> None:
    assert isinstance(build(case.full, tmp_path).plan(make_call(400)), Dense)
    for length in (1, 7):
        assert isinstance(build(case.small, tmp_path).plan(make_call(length)), Dense)


@pytest.mark.parametrize(
    "windows", [(7, None), (GrowingWindow(-3 << 16, 1 << 15, 2, 40), GrowingWindow(0, 9999, 1, 9))]
)
def test_computed_pairs_are_those_of_the_mask(windows: tuple[Window, ...]) -> None:
    call = make_call(60, queries=20, row_starts=[0, 45, 3])
    plan = SpanPlan.of(call, (2, 0), windows)
    assert torch.equal(plan.computed_pairs(), plan.mask().sum((-1, -2)))


# A model with the ring.


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
    """Pieces of any size, also such that a row begins after the first ones; a full head never turns."""
    batch = batch_of(100, pad)
    expected = by_mask(model, batch, moa_spans(model, 120) if policy == "total" else current_spans(model))
    rules = rules_of(model).model_copy(update={"length_policy": policy})
    with patched(model, moa(tmp_path, model, rules)):
        for pieces in SPLITS:
            if pad < pieces[0]:
                close(fed(model, batch, pieces, span_cache(model, 120)), expected, batch["attention_mask"])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_windows_of_the_own_prefix_do_not_depend_on_the_answer(cache: str, tmp_path: Path) -> None:
    """`length_policy: current`: the first tokens of a long answer are those of a short one, as the oracle has them."""
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
    """StreamingLLM, and DuoAttention with every second head full, are uniform masks of their own."""
    batch, heads = batch_of(100), model.config.num_key_value_heads
    streaming = {"method": "streamingllm", "sink": 5, "window": 21}
    (tmp_path / "gates.tsv").write_text("\n".join("\t".join(["0.9", "0.1"][:heads]) for _ in range(3)))
    gates = {"calibration": str(tmp_path / "gates.tsv"), "sink": 4, "recent": 124, "sparsity": 0.5 if heads == 2 else 1}
    for both, spans in (
        (streaming, [(5, 21)] * heads),
        ({"method": "duoattention", **gates}, [(0, 1000), (4, 124)] if heads == 2 else [(4, 124)]),
    ):
        expected = by_mask(model, batch, {layer: spans for layer in full_layers(model)})
        with patched(model, {"both": both}):
            for pieces in ([80, *[1] * 20], [31, 50, 19]):
                close(fed(model, batch, pieces, span_cache(model, 100)), expected, batch["attention_mask"])


def test_a_dense_prompt_and_sparse_answers() -> None:
    """`decode` alone: the prompt is dense, each token after it reads by the spans."""
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
    """With the cache that `generate` makes as with one that keeps everything; only where heads keep their own keys."""
    model, batch = FAMILIES[family](), batch_of()
    with patched(model, {"both": {"method": "streamingllm", "sink": 4, "window": 17}, "on_unsupported": "error"}):
        found = generated(model, batch, 8)
        expected = generated(model, batch, 8, past_key_values=DynamicCache(config=model.config))
    close(torch.stack(found.logits), torch.stack(expected.logits))
    rings = sum(isinstance(layer, RingLayer) for layer in found.past_key_values.layers)
    assert rings == (0 if family in ("gemma4", "minicpm3") else len(full_layers(model)))


@pytest.mark.parametrize("pad", [0, 9])
def test_a_static_cache_and_its_compiled_step(model: PreTrainedModel, pad: int, tmp_path: Path) -> None:
    """Rings whose length is known on the device only; one graph without a break."""
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
        compiled = generated(model, batch, cache_implementation="static", compile_config=options)
        assert sparsity_report(model).layers[-1].decode.calls == before.layers[-1].decode.calls, "it was not compiled"
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
    """What is seen is known on the device only; reset, the cache serves another text."""
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
    """Heads that still have everything get the span of the new length, the others keep theirs."""
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


@pytest.mark.parametrize("pad", [0, 9])
def test_the_ring_holds_what_the_spans_have(pad: int, tmp_path: Path) -> None:
    """After every step: the first tokens and the last ones, each in its slot, and nothing else."""
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
    """Prompts about as long as sink, span and two spans, then tokens."""
    model, batch = llama(), batch_of(40, pad=0)
    expected = by_mask(model, batch, {layer: [(3, 5)] * 2 for layer in range(3)})
    with patched(model, {"both": {"method": "streamingllm", "sink": 3, "window": 5}}):
        close(fed(model, batch, [length, *[1] * 20], span_cache(model, 40)), expected[:, : length + 20])


def test_spans_that_reach_everywhere_are_dense(model: PreTrainedModel, tmp_path: Path) -> None:
    batch, heads = batch_of(), model.config.num_key_value_heads
    dense = generated(model, batch)
    every = duo_rules(shape_of(model), {(layer, head) for layer in range(3) for head in range(heads)})
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


# Memory.


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
    """Layers that are not selected grow; a cache of the user's own is right, and the report names its cost."""
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


# What a ring cannot do.


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
    """Padding on the right: prompt and next token are what they are unpatched, the reason is counted."""
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


# Settings.


def refused(model: PreTrainedModel, config: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        patch_model(model, config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_plans_are_one_line(tmp_path: Path) -> None:
    model = llama()
    refused(model, "moa", 'prefill.calibration: moa needs a plan for this model; run "sparse-patch calibrate moa')
    refused(model, "duoattention", "duoattention needs a plan for this model")
    refused(model, moa(tmp_path, model, rules_of(qwen3())), "was made for another model: model_type qwen3, this one")
    one = moa(tmp_path, model)["both"]
    refused(
        model,
        {"prefill": one, "decode": {**one, "calibration": "other.json"}},
        "dict: decode.calibration: other.json is not that of prefill",
    )
    with patched(model, {"prefill": one, "decode": {"method": "streamingllm"}}):
        pass


def test_published_files_are_read_and_the_report_says_to_what(tmp_path: Path) -> None:
    model = llama()
    rules = {"alphas": [[0, 2048, 0, 0]] * 3, "betas": [[0.5, 0, 0.25, 1.0]] * 3}
    (tmp_path / "moa.json").write_text(json.dumps(rules))
    (tmp_path / "gates.tsv").write_text("0.9\t0.1\n" * 3)
    for method, name, said in (
        ("moa", "moa.json", "moa: keeps 0.75 of the keys at 16384 tokens; "),
        ("duoattention", "gates.tsv", "3 of 6 KV heads are full, the others keep 64 + 256 tokens"),
    ):
        with patched(model, {"both": {"method": method, "calibration": str(tmp_path / name)}}):
            (remark,) = sparsity_report(model).remarks
        assert said in remark
    assert "rules of 4 heads as rules of 2 KV heads" not in remark


def test_a_plan_may_have_prompts_read_densely(tmp_path: Path) -> None:
    model, batch = llama(), batch_of()
    dense = generated(model, batch, 1).logits[0]
    rules = rules_of(model).model_copy(update={"prefill": "dense"})
    with patched(model, moa(tmp_path, model, rules)):
        result = generated(model, batch)
        report = sparsity_report(model)
    assert torch.equal(result.logits[0], dense)
    assert report.layers[0].prefill.dense == {"the plan has prompts read densely": 1}
    assert report.layers[0].decode.sparse_calls == NEW - 1


def test_a_file_counts_from_the_folder_of_the_yaml(tmp_path: Path) -> None:
    model = llama()
    moa(tmp_path, model)
    (tmp_path / "my.yaml").write_text("both:\n  method: moa\n  calibration: plan.json\n")
    config = load_config(tmp_path / "my.yaml")
    assert config.prefill == config.decode and config.settings()["decode"]["calibration"] == str(tmp_path / "plan.json")


def test_show_says_what_layers_keep(tmp_path: Path, needle_llama_path: Path) -> None:
    layers, kv = inspect(needle_llama_path, load_config("streamingllm", both={"layers": [1]}), 4096)
    assert kv == KVBytes(4096, 2 * 2 * 64 * 2 * (2004 + 7 * 4096), 2 * 2 * 64 * 2 * 8 * 4096)
    assert [layer["role"] for layer in layers[:3]] == ["", "keeps 2004 of 16384", ""]


def test_plans_are_captured(tmp_path: Path) -> None:
    model = llama()
    with patched(model, moa(tmp_path, model)), capture_plans(model) as plans:
        generated(model, batch_of(), 3)
    assert [phase for phase, _ in plans[0]] == ["prefill", "decode", "decode"]
    last = plans[1][-1][1]
    assert isinstance(last, SpanPlan) and last.capacity == LENGTH + 2 and last.mask().shape == (2, 4, 1, LENGTH + 2)
