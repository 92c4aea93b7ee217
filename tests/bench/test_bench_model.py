"""The whole-model benchmark at test sizes: what is timed, the state of the model, and what is written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from sparse_patch import ConfigError, TaskError
from sparse_patch.bench import model as bench
from sparse_patch.bench.common import Architecture
from sparse_patch.bench.model import (
    BEST,
    COPYING,
    UNPATCHED,
    Benchmark,
    Generation,
    as_json,
    bench_model,
    methods_of,
    notes,
    table,
)
from sparse_patch.bench.qkv import Shape
from sparse_patch.integration.caches.layers import GrowingLayer
from sparse_patch.integration.caches.size import CacheBytes
from sparse_patch.integration.patch import is_patched

TINY = Architecture("llama", 4, 64, 128, 90, Shape(4, 2, 16), 1e4)


@pytest.fixture
def benchmark_(tmp_path: Path) -> Benchmark:
    (tmp_path / "delta.yaml").write_text(
        "decode: {method: delta, budget: 32, recency_pages: 1, min_length: 40, roles: {full: [0], select: [1]}}\n"
        "on_unsupported: silent"
    )
    methods = methods_of([str(tmp_path / "delta.yaml")], TINY)
    return Benchmark(TINY, [60, 90], 2, 4, methods, "dynamic", True, torch.float32, "cpu")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_one_row_for_each_way_and_length(benchmark_: Benchmark, cache: Any) -> None:
    benchmark = replace(benchmark_, cache=cache)
    steps: list[str] = []
    result = bench_model(benchmark, steps.append)
    assert len(steps) == benchmark.steps
    labels = [*([COPYING] if cache == "dynamic" else []), UNPATCHED, BEST, "delta"]
    assert [(row.label, row.length) for row in result.rows] == [(label, n) for n in (60, 90) for label in labels]
    for row in result.rows:
        base = {other.label: other.token_ms for other in result.rows if other.length == row.length}
        assert row.unpatched == pytest.approx(row.token_ms / base[UNPATCHED])
        assert row.best == pytest.approx(row.token_ms / base[BEST]) and row.peak_memory_mb is None
        assert row.decode_memory_mb is None and row.planned_mb <= row.kv_mb
        assert row.kv_mb >= 2 * 4 * 2 * 2 * (row.length + 3) * 16 * 4 / 2**20
        assert 0 < row.token_ms <= row.slowest_token_ms and row.first_token_ms > 0
        assert (row.config == "delta") == (row.label == "delta")
    data = json.loads(json.dumps(as_json(result, benchmark)))
    assert data["machine"]["dtype"] == "float32" and data["cache"] == cache and data["compiled"] is False
    assert data["configs"]["delta"]["decode"]["budget"] == 32 and len(data["rows"]) == len(result.rows)
    assert table(result, benchmark).row_count == len(result.rows)


def test_the_time_of_a_token_is_the_median_of_the_second_run(
    benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = CacheBytes(3 * 2**20, 2**20, 9 * 2**20)
    runs = iter(
        [Generation([9.0, 99.0, 999.0, 9999.0], None, kv), Generation([1.0, 1.5, 1.6, 1.8], (2**22, 2**21), kv)]
    )
    monkeypatch.setattr(bench, "generate", lambda *_: next(runs))
    model = benchmark_.model()
    row = bench._row(benchmark_, model, benchmark_.prompt(60), "delta", benchmark_.methods["delta"])
    assert (
        row.first_token_ms == 1000 and row.token_ms == pytest.approx(200) and row.slowest_token_ms == pytest.approx(500)
    )
    assert (row.peak_memory_mb, row.decode_memory_mb, row.kv_mb, row.planned_mb) == (4, 2, 3, 1)
    assert not is_patched(model)


def test_dense_ways_can_be_left_out_and_prompts_read_in_chunks(
    benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = replace(benchmark_, dense=[BEST], chunk=25, lengths=[60], methods={})
    model, lengths = benchmark.model(), list[int]()
    monkeypatch.setattr(Benchmark, "model", lambda _: model)
    model.model.register_forward_pre_hook(  # type: ignore[operator, union-attr]
        lambda _, __, keywords: lengths.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    result = bench_model(benchmark)
    assert [row.label for row in result.rows] == [BEST] and benchmark.steps == 1
    assert lengths == [25, 25, 10, 1, 1, 1] * 2 and as_json(result, benchmark)["chunk"] == 25


def test_every_way_has_its_cache_and_its_patch(benchmark_: Benchmark) -> None:
    """In each variant the model has the right patch and reads the requested kind of cache."""
    model = benchmark_.model()
    seen: list[Any] = []

    def look(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        seen.append((keywords["past_key_values"], is_patched(model)))

    model.model.register_forward_pre_hook(look, with_kwargs=True)  # type: ignore[operator, union-attr]
    for label, config in benchmark_.ways().items():
        seen.clear()
        bench._row(benchmark_, model, benchmark_.prompt(60), label, config)
        caches = {id(cache): cache for cache, _ in seen}
        assert len(seen) == 2 * 4 and len(caches) == 2, "a fresh cache for each of the two runs"
        assert {patched for _, patched in seen} == {label not in (COPYING, UNPATCHED)}
        for cache in caches.values():
            assert isinstance(cache, DynamicCache)
            assert all(isinstance(layer, GrowingLayer) == (label != COPYING) for layer in cache.layers)
    seen.clear()
    bench.generate(replace(benchmark_, cache="static"), model, benchmark_.prompt(60), UNPATCHED)
    assert all(isinstance(cache, StaticCache) for cache, _ in seen)


def test_a_static_cache_is_as_long_as_its_own_prompt_needs(
    benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers keeps the longest cache length so far for later caches."""
    lengths: list[tuple[int, int]] = []
    run = bench.generate

    def generate(benchmark: Benchmark, model: Any, prompt: torch.Tensor, label: str) -> Generation:
        answer = run(benchmark, model, prompt, label)
        lengths.append((prompt.shape[1], model._previous_max_cache_length))
        return answer

    monkeypatch.setattr(bench, "generate", generate)
    bench_model(replace(benchmark_, cache="static", lengths=[90, 60], methods={}))
    assert set(lengths) == {(90, lengths[0][1]), (60, lengths[0][1] - 30)} and lengths[0][1] in (93, 94)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_other_architectures_can_be_made(kind: str, benchmark_: Benchmark) -> None:
    model = replace(benchmark_, architecture=replace(TINY, model_type=kind)).model()
    assert model.config.model_type == kind and model.config.rope_parameters["rope_theta"] == 1e4
    assert {type(layer.self_attn).__name__ for layer in model.model.layers} == {f"{kind.capitalize()}Attention"}  # type: ignore[union-attr]


def test_the_model_has_the_sizes(benchmark_: Benchmark) -> None:
    model = benchmark_.model()
    assert model.config.num_hidden_layers == 4 and model.config.max_position_embeddings == 94
    assert model.lm_head.weight.shape == (90, 64) and model.model.layers[0].mlp.up_proj.weight.shape == (128, 64)  # type: ignore[union-attr, index]
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (32, 64)  # type: ignore[union-attr, index]
    assert benchmark_.prompt(60).shape == (2, 60)


def test_what_did_not_run_is_noted(benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench._row

    def row(benchmark: Any, model: Any, prompt: torch.Tensor, label: str, config: Any) -> Any:
        if label == UNPATCHED:
            raise torch.OutOfMemoryError("much")
        return replace(run(benchmark, model, prompt, label, config), fallbacks={"left": 3} if config else {})

    monkeypatch.setattr(bench, "_row", row)
    result = bench_model(replace(benchmark_, lengths=[60], cache="static"))
    assert [row.unpatched for row in result.rows] == [None, None]
    assert list(notes(result)) == [
        f"{BEST}, 60 tokens: 3 calls were dense: left",
        "delta, 60 tokens: 3 calls were dense: left",
        "skipped at 60: unpatched: out of memory",
    ]


def test_configurations_that_cannot_be_timed(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("decode: {method: dense}")
    with pytest.raises(TaskError, match=r"d.yaml: has no sparse method to time"):
        methods_of([str(tmp_path / "d.yaml")], TINY)
    (tmp_path / "p.yaml").write_text("prefill: {method: flexprefill}")
    assert list(methods_of([str(tmp_path / "p.yaml")], TINY)) == ["p"]
    (tmp_path / "l.yaml").write_text("decode: {method: lessismore}")
    with pytest.raises(ConfigError, match="no published choice for this model"):
        methods_of([str(tmp_path / "l.yaml")], TINY)
