"""The prefill benchmark at test sizes: what is timed, on which queries and keys, and what is written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.programs import program
from calls import make_call
from safetensors.torch import save_file
from transformers import AutoTokenizer

from sparse_patch import ConfigError, TaskError, UnsupportedCallError
from sparse_patch.artefacts.head_schedules import HeadSchedules, write_head_schedules
from sparse_patch.bench import common, prefill
from sparse_patch.bench import qkv as recording
from sparse_patch.bench.common import Architecture, dtype_of, shape_of
from sparse_patch.bench.prefill import (
    Benchmark,
    Row,
    as_json,
    bench_prefill,
    break_even,
    methods_of,
    notes,
    random_plan,
    table,
)
from sparse_patch.bench.qkv import Inputs, Shape, expanded, file_inputs, random_inputs, recorded_inputs
from sparse_patch.call import AttentionCall
from sparse_patch.models.loading import load_model
from sparse_patch.ops.attention import block_sparse, dense
from sparse_patch.plots import plot_bench

SHAPE = Shape(2, 1, 16)
METHOD = "prefill: {method: flexprefill, block_size: 32, min_budget: 64, min_length: 300, gamma: 0.8}"


@pytest.fixture
def benchmark_(tmp_path: Path) -> Benchmark:
    (tmp_path / "mine.yaml").write_text(METHOD)
    methods = methods_of([str(tmp_path / "mine.yaml")])
    return Benchmark(random_inputs(SHAPE, torch.float32, "cpu"), [256, 640], [0.1, 0.7], methods, "cpu")


def test_one_row_for_each_way_and_length(benchmark_: Benchmark) -> None:
    steps: list[str] = []
    result = bench_prefill(benchmark_, steps.append)
    assert len(steps) == benchmark_.steps == 8
    assert [(row.label, row.length) for row in result.rows] == [
        *(("sdpa, dense", 256), ("torch, 10 %", 256), ("torch, 70 %", 256)),
        *(("sdpa, dense", 640), ("torch, 10 %", 640), ("torch, 70 %", 640), ("mine (torch)", 640)),
    ]
    assert result.skipped == {"mine: dense, shorter than min_length 300": [256]}
    for row in result.rows:
        base = next(other for other in result.rows if other.kind == "dense" and other.length == row.length)
        assert row.speedup == pytest.approx(base.total_ms / row.total_ms) and row.speedup_flash2 is None
        pairs = row.density * row.length * (row.length + 1) / 2
        assert row.tflops_effective == pytest.approx(2 * 4 * 16 * pairs / (row.ms / 1000) / 1e12, rel=1e-4)
        assert (row.selection_ms is not None) == (row.kind == "method") and row.peak_memory_mb is None
        assert row.kind == "method" or row.total_ms == row.ms
    assert result.rows[0].density == 1


def test_blocks_by_the_token_run_on_their_own_op(benchmark_: Benchmark, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("both: {method: infllmv2, topk: 3, window_size: 64, min_length: 0}")
    methods = methods_of([str(tmp_path / "own.yaml")])
    result = bench_prefill(replace(benchmark_, methods=methods, lengths=[256, 640], densities=[]))
    assert [row.label for row in result.rows] == ["sdpa, dense", "sdpa, dense", "own (torch)"]
    assert result.rows[2].density < 0.75 and result.rows[2].selection_ms is not None
    assert list(result.skipped) == ["own: dense, no more than the 4 blocks that a token reads"]


def test_spans_run_on_their_own_op(benchmark_: Benchmark, tmp_path: Path) -> None:
    (tmp_path / "spans.yaml").write_text("both: {method: streamingllm, sink: 4, window: 60}")
    (tmp_path / "plan.yaml").write_text("both: {method: moa}")
    methods = methods_of([str(tmp_path / "spans.yaml")])
    result = bench_prefill(replace(benchmark_, methods=methods, lengths=[640], densities=[]))
    assert [row.label for row in result.rows] == ["sdpa, dense", "spans (torch)"]
    assert result.rows[1].density == pytest.approx((64 * 65 / 2 + 576 * 64) / (640 * 641 / 2))
    tiny = Architecture("llama", 1, 64, 128, 90, benchmark_.inputs.shape, 1e4)
    with pytest.raises(ConfigError, match=r"plan\.yaml: .*calibration: moa needs head schedules for this model"):
        methods_of([str(tmp_path / "plan.yaml")], tiny)
    (tmp_path / "file.yaml").write_text("prefill: {method: moa, calibration: plan.json}")
    with pytest.raises(TaskError, match=r"^--config: file: names a calibration, which is one of a model; .* --shape"):
        methods_of([str(tmp_path / "file.yaml")])
    rules = HeadSchedules.of(tiny.model_shape, [[0.0] * tiny.heads.kv_heads], [[0.5] * tiny.heads.kv_heads])
    write_head_schedules(tmp_path / "plan.json", rules)
    (tmp_path / "plan.yaml").write_text("both: {method: moa, calibration: plan.json}")
    methods = methods_of([str(tmp_path / "plan.yaml")], tiny)
    result = bench_prefill(replace(benchmark_, methods=methods, lengths=[640], densities=[]))
    assert result.rows[1].density == pytest.approx((320 * 321 / 2 + 320 * 320) / (640 * 641 / 2))


def test_a_method_is_its_selection_and_the_kernel_on_its_plan(
    benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use a clock that counts runs: the kernel, the selection, and both together are timed separately."""
    calls: list[str] = []
    attend, config = block_sparse.OP.attend, benchmark_.methods["mine"]
    assert config.prefill is not None
    plan = type(config.prefill).plan

    def planned(self: Any, call: AttentionCall) -> Any:
        calls.append("plan")
        return plan(self, call)

    def attended(*arguments: Any) -> Any:
        calls.append("attend")
        return attend(*arguments)

    def clocked(function: Any) -> float:
        calls.clear()
        function()
        return {("attend",): 3.0, ("plan",): 2.0, ("plan", "attend"): 4.5}[tuple(calls)]

    monkeypatch.setattr(type(config.prefill), "plan", planned)
    monkeypatch.setattr(block_sparse.OP, "attend", attended)
    monkeypatch.setattr(common, "clocked", clocked)
    row = prefill._method_row(benchmark_.inputs.make(640), "mine", config)
    assert (row.ms, row.selection_ms, row.total_ms) == (3.0, 2.0, 4.5)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.9, 1.0])
def test_random_blocks_have_the_density_and_can_have_no_less(density: float) -> None:
    call = make_call(128 * 40, heads=(4, 2))
    plan = random_plan(call, density)
    floor = (40 / 2 + 39) / (40**2 / 2)
    assert plan.density().mean().item() == pytest.approx(max(density, floor), abs=0.01)
    assert plan.on_diagonal.all() and plan.blocks()[..., 0].all()
    assert torch.equal(random_plan(call, density).indices, plan.indices), "the same for every kernel"
    assert random_plan(make_call(100), density).density().tolist() == [[1.0] * 4]


def test_break_even_is_the_first_length_where_the_whole_is_faster(benchmark_: Benchmark) -> None:
    row = Row("method", "a (flash)", "flash", "a", 1024, 0.2, 1.0, 1.0, 1.0, 2.0, 0.9, 1.1)
    rows = [row, replace(row, length=4096, speedup=1.4), replace(row, length=2048, speedup=1.2), row]
    assert break_even(rows) == {"a": {"fastest_dense": 2048, "flash2": 1024}}
    assert break_even([row]) == {"a": {"fastest_dense": None, "flash2": 1024}}
    assert break_even([replace(row, speedup_flash2=None)]) == {"a": {"fastest_dense": None}}, "flash2 did not run"


def test_out_of_memory_and_refusals_are_noted(benchmark_: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(call: AttentionCall, kernel: str) -> torch.Tensor:
        if call.kv_length > 300:
            raise torch.OutOfMemoryError("much")
        raise UnsupportedCallError("not this one")

    monkeypatch.setattr(dense, "attend", attend)
    result = bench_prefill(replace(benchmark_, methods={}))
    assert {row.kind for row in result.rows} == {"blocks"} and {row.speedup for row in result.rows} == {None}
    assert result.skipped == {"sdpa: not this one": [256], "sdpa: out of memory": [640]}
    assert notes(result) == ["skipped at 256: sdpa: not this one", "skipped at 640: sdpa: out of memory"]


def test_the_json_draws_the_picture_and_the_readme(benchmark_: Benchmark, tmp_path: Path) -> None:
    result = bench_prefill(benchmark_)
    data = json.loads(json.dumps(as_json(result, benchmark_, torch.float32)))
    assert data["machine"]["dtype"] == "float32" and data["machine"]["shape"]["head_dim"] == 16
    assert data["machine"]["device"] and data["machine"]["torch"] and data["qkv"] == "random Q/K/V"
    assert data["configs"]["mine"]["prefill"]["gamma"] == 0.8 and len(data["rows"]) == 7
    plot_bench(data, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert table(result, benchmark_, torch.float32).row_count == 7
    (tmp_path / "here").mkdir()
    data["rows"][0] |= {"total_ms": 1.234, "speedup": 1.0}
    data["rows"][-1] |= {"total_ms": 12.34, "speedup": 0.5, "density": 0.25}
    (tmp_path / "here" / "prefill.json").write_text(json.dumps(data))
    drawn = program("update_readme").prefill_tables(tmp_path)
    assert "| attention of one layer | 256 tokens | 640 tokens |" in drawn
    assert "| sdpa, dense | 1.23 ms, 1.00 x |" in drawn
    assert "| `mine` |  | 12.3 ms, 0.50 x (density 0.25) |" in drawn
    assert data["machine"]["device"] in drawn
    assert "No measured machine" in program("update_readme").prefill_tables(tmp_path / "here")


def softmax(call: AttentionCall, head: int) -> torch.Tensor:
    logits = call.q[0, head].float() @ call.k[0, head // call.group_size].float().T * call.scale
    above = torch.ones(logits.shape, dtype=torch.bool).triu(1)
    return logits.masked_fill(above, -torch.inf).softmax(-1)


def test_expanding_keeps_the_attention_of_the_recorded_heads() -> None:
    calls = [make_call(90, heads=(4, 2), seed=seed) for seed in range(4)]
    wide = expanded(calls, Shape(8, 4, 32), torch.float32, "cpu")
    assert (wide.q.shape, wide.k.shape, wide.v.shape) == ((1, 8, 90, 32), (1, 4, 90, 32), (1, 4, 90, 32))
    for head in range(8):  # KV head 0 of each of the four calls, with its two query heads
        torch.testing.assert_close(softmax(wide, head), softmax(calls[head // 2], head % 2))
    more = expanded(calls[:1], Shape(10, 2, 16), torch.bfloat16, "cpu")
    assert more.q.dtype == torch.bfloat16 and torch.equal(more.q[0, 2], more.q[0, 0]), "query heads repeat"
    assert expanded(calls, Shape(6, 3, 24), torch.float32, "cpu").q.shape == (1, 6, 90, 24)


def test_recorded_calls_are_those_of_the_model(needle_llama_path: Path) -> None:
    """Recorded attention has the structure that random queries lack: half of the mass lies on few keys."""
    inputs = recorded_inputs(needle_llama_path, Shape(8, 4, 64), torch.float32, "cpu", [300])
    call = inputs.make(300)
    assert call.q.shape == (1, 8, 300, 64) and call.k.shape == (1, 4, 300, 64) and call.phase == "prefill"
    assert "needle-llama" in inputs.about and "niah_multikey_2" in inputs.about
    noise = random_inputs(Shape(8, 4, 64), torch.float32, "cpu").make(300)
    top = [sum(softmax(c, head)[-1].topk(10).values.sum().item() for head in range(8)) / 8 for c in (call, noise)]
    assert top[0] > 2 * top[1]
    with pytest.raises(TaskError, match="niah_multikey_2"):
        recorded_inputs(needle_llama_path, SHAPE, torch.float32, "cpu", [8])


def test_recording_leaves_the_model_as_it_was(needle_llama_path: Path) -> None:
    model, _ = load_model(needle_llama_path)
    tokens = AutoTokenizer.from_pretrained(needle_llama_path)("A few words to read.")["input_ids"]
    with torch.no_grad():
        before = model(torch.tensor([tokens])).logits
        calls = recording.record_calls(model, tokens)
        assert torch.equal(model(torch.tensor([tokens])).logits, before)
    assert [call.layer for call in calls] == list(range(8)) and calls[0].scale == 64**-0.5


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    call = make_call(200, heads=(4, 2))
    tensors = {"q": call.q.contiguous(), "k": call.k, "v": call.v}
    save_file(tensors, tmp_path / "own.safetensors", metadata={"scale": str(call.scale)})
    inputs = file_inputs(tmp_path / "own.safetensors", None, torch.float32, "cpu", [100, 200])
    assert inputs.shape == Shape(4, 2, 16) and "own.safetensors" in inputs.about
    made = inputs.make(100)
    assert torch.equal(made.q, call.q[:, :, :100]) and torch.equal(made.v, call.v[:, :, :100])
    assert made.scale == call.scale
    assert file_inputs(tmp_path / "own.safetensors", SHAPE, torch.float32, "cpu", [50]).make(50).q.shape[1] == 2


def test_words_of_the_command_line(tmp_path: Path) -> None:
    assert shape_of("llama-3.1-8b") == Shape(32, 8, 128) and shape_of("minicpm4-8b") == Shape(32, 2, 128)
    assert shape_of("6,3,64") == Shape(6, 3, 64)
    for text in ("6,4,64", "0,1,64", "6,3", "six,3,64"):
        with pytest.raises(TaskError, match="--shape: expected"):
            shape_of(text)
    with pytest.raises(TaskError, match="did you mean 'bfloat16'"):
        dtype_of("bfloat")
    with pytest.raises(TaskError, match="there is another configuration called 'flexprefill'"):
        methods_of(["flexprefill", "flexprefill.yaml"])


def test_every_way_gets_the_same_call() -> None:
    made: list[int] = []
    inputs = random_inputs(SHAPE, torch.float32, "cpu")

    def make(length: int) -> AttentionCall:
        made.append(length)
        return inputs.make(length)

    bench_prefill(Benchmark(Inputs("", SHAPE, make), [64, 32], [0.5], {}, "cpu"))
    assert made == [64, 32]
