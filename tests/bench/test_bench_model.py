"""The whole-model benchmark at test sizes: what is timed, the state of the model, and what is written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, StaticCache

from sparse_patch import ConfigError, SparsePatchError, TaskError
from sparse_patch.bench import model as bench
from sparse_patch.bench.common import Architecture
from sparse_patch.bench.model import Benchmark, Way, as_json, bench_model, methods_of, notes, table
from sparse_patch.bench.model_rows import BEST, UNPATCHED
from sparse_patch.bench.model_timing import Generation, generate
from sparse_patch.bench.model_weights import RandomWeights, SavedWeights
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
    methods = methods_of([str(tmp_path / "delta.yaml")], TINY.model_shape)
    return Benchmark(RandomWeights(TINY), [60, 90], 2, 4, methods, ["default", "static"], torch.float32, "cpu")


def with_sizes(benchmark: Benchmark, sizes: Architecture) -> Benchmark:
    return replace(benchmark, weights=RandomWeights(sizes))


def test_one_row_for_each_way_mode_and_length(benchmark_: Benchmark) -> None:
    steps: list[str] = []
    result = bench_model(benchmark_, steps.append)
    assert len(steps) == benchmark_.steps == 12
    assert [(row.label, row.mode, row.length) for row in result.rows] == [
        (label, mode, length)
        for length in (60, 90)
        for mode in ("default", "static")
        for label in (UNPATCHED, BEST, "delta")
    ]
    for row in result.rows:
        base = {
            other.label: other.token_ms for other in result.rows if (other.length, other.mode) == (row.length, row.mode)
        }
        assert row.x_unpatched == pytest.approx(row.token_ms / base[UNPATCHED])
        assert row.x_best == pytest.approx(row.token_ms / base[BEST]) and row.peak_memory_mb is None
        assert row.decode_memory_mb is None and row.planned_mb <= row.kv_mb and row.batch == 2
        assert row.kv_mb >= 2 * 4 * 2 * 2 * (row.length + 3) * 16 * 4 / 2**20
        assert 0 < row.token_ms <= row.slowest_token_ms and row.first_token_s > 0 and row.capture_s is None
        assert (row.config == "delta") == (row.label == "delta")
    data = json.loads(json.dumps(as_json(result, benchmark_)))
    assert data["machine"]["dtype"] == "float32" and data["weights"] == "random" and data["shape"]["layers"] == 4
    assert data["configs"]["delta"]["decode"]["budget"] == 32 and len(data["rows"]) == len(result.rows)
    wanted = {"label", "length", "batch", "mode", "first_token_s", "token_ms", "x_unpatched", "capture_s"}
    assert wanted <= set(data["rows"][0])
    assert table(result, benchmark_).row_count == len(result.rows)


def test_the_unpatched_model_is_timed_once_for_each_cache_argument(benchmark_: Benchmark) -> None:
    ways = replace(benchmark_, modes=["eager", "default", "static"]).ways()
    assert [(way.label, way.mode) for way in ways] == [
        *[(UNPATCHED, "default"), (BEST, "eager"), ("delta", "eager"), (BEST, "default"), ("delta", "default")],
        *[(UNPATCHED, "static"), (BEST, "static"), ("delta", "static")],
    ]
    best = ways[1].config
    assert best is not None and best.dense == "best" and all(way.config is None for way in ways[::5])


def test_eager_rows_have_no_decode_graph_and_the_unpatched_row_beside_them(
    benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def look(model: Any, *arguments: Any) -> Generation:
        seen.append(model.sparse_patch.config.decode_graph if is_patched(model) else None)
        return generate(model, *arguments)

    monkeypatch.setattr(bench, "generate", look)
    rows = bench_model(replace(benchmark_, modes=["default", "eager"], lengths=[60])).rows
    assert seen[::2] == seen[1::2] == [None, "auto", "auto", "off", "off"]
    assert [row.mode for row in rows] == ["default"] * 3 + ["eager"] * 2
    assert rows[-1].x_unpatched == pytest.approx(rows[-1].token_ms / rows[0].token_ms)
    assert rows[-1].x_best == pytest.approx(rows[-1].token_ms / rows[-2].token_ms)


def test_the_time_of_a_token_is_the_median_of_the_second_run(
    benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv = CacheBytes(3 * 2**20, 2**20, 9 * 2**20)
    runs = iter(
        [Generation([9.0, 99.0, 999.0, 9999.0], None, kv), Generation([1.0, 1.5, 1.6, 1.8], (2**22, 2**21), kv)]
    )
    monkeypatch.setattr(bench, "generate", lambda *_: next(runs))
    monkeypatch.setattr(bench, "capture_seconds", lambda report: 0.25 if report.hook_active else None)
    model = benchmark_.model()
    way = Way("delta", "default", benchmark_.methods["delta"])
    row = bench._row(benchmark_, model, benchmark_.prompt(model, 60), way)
    assert row.first_token_s == 1 and row.token_ms == pytest.approx(200)
    assert row.first_run_token_ms == pytest.approx(900_000)
    assert row.slowest_token_ms == pytest.approx(500) and row.capture_s == 0.25
    assert (row.peak_memory_mb, row.decode_memory_mb, row.kv_mb, row.planned_mb) == (4, 2, 3, 1)
    assert not is_patched(model)


def test_dense_ways_can_be_left_out_and_prompts_read_in_chunks(
    benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = replace(benchmark_, dense=[BEST], chunk=25, lengths=[60], methods={}, modes=["default"])
    model, lengths = benchmark.model(), list[int]()
    monkeypatch.setattr(Benchmark, "model", lambda _: model)
    model.model.register_forward_pre_hook(  # type: ignore[operator, union-attr]
        lambda _, __, keywords: lengths.append(keywords["input_ids"].shape[1]), with_kwargs=True
    )
    result = bench_model(benchmark)
    assert [row.label for row in result.rows] == [BEST] and benchmark.steps == 1
    assert lengths == [25, 25, 10, 1, 1, 1] * 2 and result.rows[0].chunk == 25
    assert result.rows[0].x_unpatched is None and result.rows[0].x_best == 1


def test_every_way_types_what_a_user_types(benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each variant the model has the right patch, and `generate` the arguments and the cache of the mode."""
    model, asked = benchmark_.model(), list[dict[str, Any]]()
    seen: list[Any] = []
    own = LlamaForCausalLM.generate

    def note(self: Any, *arguments: Any, **keywords: Any) -> Any:
        asked.append(keywords)
        return own(self, *arguments, **keywords)

    def look(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        seen.append((keywords["past_key_values"], is_patched(model)))

    monkeypatch.setattr(LlamaForCausalLM, "generate", note)
    model.model.register_forward_pre_hook(look, with_kwargs=True)  # type: ignore[operator, union-attr]
    plain = {"attention_mask", "max_new_tokens", "do_sample", "streamer", "return_dict_in_generate"}
    for way in benchmark_.ways():
        seen.clear()
        asked.clear()
        bench._row(benchmark_, model, benchmark_.prompt(model, 60), way)
        static = way.mode == "static"
        assert all(set(keywords) == plain | ({"cache_implementation"} if static else set()) for keywords in asked)
        assert {patched for _, patched in seen} == {way.label != UNPATCHED} and len(seen) == 2 * 4
        for cache in {id(cache): cache for cache, _ in seen}.values():
            assert isinstance(cache, StaticCache if static else DynamicCache)
            growing = not static and way.label != UNPATCHED
            assert all(isinstance(layer, GrowingLayer) == growing for layer in cache.layers)


def test_a_static_cache_is_as_long_as_its_own_prompt_needs(
    benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers keeps the longest cache length so far for later caches."""
    lengths: list[tuple[int, int]] = []

    def look(model: Any, prompt: torch.Tensor, *arguments: Any) -> Generation:
        answer = generate(model, prompt, *arguments)
        lengths.append((prompt.shape[1], model._previous_max_cache_length))
        return answer

    monkeypatch.setattr(bench, "generate", look)
    bench_model(replace(benchmark_, modes=["static"], lengths=[90, 60], methods={}))
    assert set(lengths) == {(90, lengths[0][1]), (60, lengths[0][1] - 30)} and lengths[0][1] in (93, 94)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_other_architectures_can_be_made(kind: str, benchmark_: Benchmark) -> None:
    model = with_sizes(benchmark_, replace(TINY, model_type=kind)).model()
    assert model.config.model_type == kind and model.config.rope_parameters["rope_theta"] == 1e4
    assert {type(layer.self_attn).__name__ for layer in model.model.layers} == {f"{kind.capitalize()}Attention"}  # type: ignore[union-attr]


def test_the_model_has_the_sizes(benchmark_: Benchmark) -> None:
    model = benchmark_.model()
    assert model.config.num_hidden_layers == 4 and model.config.max_position_embeddings == 94
    assert model.lm_head.weight.shape == (90, 64) and model.model.layers[0].mlp.up_proj.weight.shape == (128, 64)  # type: ignore[union-attr, index]
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (32, 64)  # type: ignore[union-attr, index]
    prompt = benchmark_.prompt(model, 60)
    assert prompt.shape == (2, 60) and 45 < prompt.max() < 90


def test_a_checkpoint_is_timed_with_its_own_weights(
    benchmark_: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = with_sizes(benchmark_, replace(TINY, vocabulary=70)).model()
    saved.generation_config.eos_token_id = list(range(70))  # the answer would end with its first token
    saved.save_pretrained(tmp_path / "mine")
    weights = SavedWeights(str(tmp_path / "mine"))
    assert weights.shape == TINY.model_shape
    benchmark = replace(benchmark_, weights=weights, lengths=[60], modes=["default"])
    model = benchmark.model()
    assert torch.equal(model.lm_head.weight, saved.lm_head.weight)  # type: ignore[arg-type]
    assert 35 < benchmark.prompt(model, 60).max() < 70
    data = as_json(bench_model(benchmark), benchmark)
    assert [row["label"] for row in data["rows"]] == [UNPATCHED, BEST, "delta"] and data["weights"] == "mine"
    assert data["shape"] == {"model_type": "llama", "layers": 4, "hidden": 64, "heads": {"heads": 4, "kv_heads": 2}}
    with pytest.raises(TaskError, match=r"^--lengths: a prompt of 91 tokens and 4 .* do not fit .* of 94; ask for"):
        replace(benchmark, lengths=[60, 91]).model()
    with pytest.raises(SparsePatchError, match=r"^--model: .*none: cannot be loaded"):
        _ = SavedWeights(str(tmp_path / "none")).shape


def test_what_did_not_run_is_noted(benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench._row

    def row(benchmark: Any, model: Any, prompt: torch.Tensor, way: Way) -> Any:
        if way.label == UNPATCHED:
            raise torch.OutOfMemoryError("much")
        return replace(run(benchmark, model, prompt, way), fallbacks={"left": 3})

    monkeypatch.setattr(bench, "_row", row)
    result = bench_model(replace(benchmark_, lengths=[60], modes=["static"]))
    assert [row.x_unpatched for row in result.rows] == [None, None]
    assert list(notes(result)) == [
        f"{BEST}, static, 60 tokens: 3 calls were dense: left",
        "delta, static, 60 tokens: 3 calls were dense: left",
        "skipped at 60: unpatched, static, batch 2: out of memory",
    ]


def test_configurations_that_cannot_be_timed(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("decode: {method: dense}")
    with pytest.raises(TaskError, match=r"d.yaml: has no sparse method to time"):
        methods_of([str(tmp_path / "d.yaml")], TINY.model_shape)
    (tmp_path / "p.yaml").write_text("prefill: {method: flexprefill}")
    assert list(methods_of([str(tmp_path / "p.yaml")], TINY.model_shape)) == ["p"]
    (tmp_path / "l.yaml").write_text("decode: {method: lessismore}")
    with pytest.raises(ConfigError, match="no published choice for this model"):
        methods_of([str(tmp_path / "l.yaml")], TINY.model_shape)
