"""The decode benchmark at test sizes: what is timed, the bytes it reports to move, and what is written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_patch import ConfigError, TaskError
from sparse_patch.bench import decode, decode_kernels, decode_timing
from sparse_patch.bench.common import ARCHITECTURES, Architecture, architecture_of
from sparse_patch.bench.decode import Benchmark, as_json, bench_decode, methods_of, notes, roles_of, table
from sparse_patch.bench.decode_rows import forward_state_to, random_lists
from sparse_patch.bench.decode_step import run_stack
from sparse_patch.bench.decode_timing import bytes_of
from sparse_patch.bench.qkv import Shape
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops.attention import page_decode
from sparse_patch.plans import PagePlan

TINY = Architecture("llama", 6, 64, 128, 90, Shape(4, 2, 16), 1e4)
LAYERED = "roles: {full: [0], select: [1, 4]}, budget: 32, min_length: 64"
CONFIGS = {
    "delta": f"decode: {{method: delta, recency_pages: 1, {LAYERED}}}",
    "tidal": f"decode: {{method: tidaldecode, {LAYERED}}}",
    "quest": "decode: {method: quest, budget: 64, min_length: 64}",
    "spans": "both: {method: streamingllm, sink: 4, window: 60, layers: {exclude: [0]}}",
}


def made(folder: Path, *names: str, **changes: Any) -> Benchmark:
    for name in names:
        (folder / f"{name}.yaml").write_text(CONFIGS[name])
    methods = methods_of([str(folder / f"{name}.yaml") for name in names], TINY)
    about = {"lengths": [200], "batch": 2, "budgets": [32], "dtype": torch.float32, "device": "cpu"} | changes
    return Benchmark(architecture=TINY, methods=methods, **about)


@pytest.fixture(autouse=True)
def _one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs each step once and counts layers: the timed code must really run."""

    def clocked(step: Callable[[], object]) -> float:
        step()
        return 6.0

    monkeypatch.setattr(decode_timing, "clocked", clocked)


def test_one_row_for_each_way_and_length(tmp_path: Path) -> None:
    benchmark = made(tmp_path, "delta", "tidal", "quest", lengths=[200, 300])
    steps: list[str] = []
    result = bench_decode(benchmark, steps.append)
    assert len(steps) == benchmark.steps
    labels = [
        *("page_decode (torch)", "sdpa"),
        *(f"32 tokens, {lists}, pages of {p}" for lists in decode.lists_of(TINY) for p in (16, 1)),
        *("dense, logits, top 32 tokens", "delta: select", "delta: sparse", "tidal: select", "tidal: sparse"),
        *("quest: layer", "delta: 6 layers", "tidal: 6 layers", "quest: 6 layers"),
    ]
    assert [(row.label, row.length) for row in result.rows] == [(label, n) for n in (200, 300) for label in labels]
    assert {what.split(":")[0] for what in result.skipped} == set(decode_kernels.KERNELS) - {"sdpa"}
    assert all(line.startswith("skipped at 200, 300: ") for line in notes(result))
    for row in result.rows:
        whole = row.kind == "stack"
        assert row.layers == (6 if whole else 1) and row.ms == (6.0 if whole else 1.0)
        assert row.dense == pytest.approx(row.ms / row.layers)
        assert row.floor_ms == pytest.approx(row.mb / result.gb_per_s) and row.floors == row.ms / row.floor_ms
    dense, stack = result.rows[0], next(row for row in result.rows if row.label == "delta: 6 layers")
    assert dense.mb == pytest.approx(2 * 2 * 200 * (16 + 16) * 4 / 1e6)  # rows, KV heads, keys, K and V, bytes
    sparse, select = (next(r.mb for r in result.rows if r.label == f"delta: {role}") for role in ("sparse", "select"))
    assert stack.mb == pytest.approx(dense.mb + 2 * select + 3 * sparse)
    assert select == pytest.approx(dense.mb + 2 * 2 * 4 * 200 * 4 / 1e6)  # rows, query heads, keys; written and read
    data = json.loads(json.dumps(as_json(result, benchmark)))
    assert data["machine"]["dtype"] == "float32" and data["shape"]["layers"] == 6 and data["copy_gb_per_s"] > 0
    assert data["configs"]["delta"]["decode"]["budget"] == 32 and len(data["rows"]) == len(result.rows)
    assert table(result, benchmark).row_count == len(result.rows)


def test_spans_run_on_rings(tmp_path: Path) -> None:
    """Five layers keep 64 tokens of two heads and two rows; one layer keeps all 200."""
    benchmark = made(tmp_path, "spans")
    steps: list[str] = []
    result = bench_decode(benchmark, steps.append)
    assert len(steps) == benchmark.steps and not any("spans" in what for what in result.skipped)
    (stack,) = (row for row in result.rows if row.config == "spans")
    assert stack.label == "spans: 6 layers" and stack.kind == "stack"
    assert stack.mb == pytest.approx((5 * 64 + 200) * 2 * 2 * (16 + 16) * 4 / 1e6)


@pytest.mark.parametrize("lists", [1, 2, 4])
@pytest.mark.parametrize("page_size", [16, 1])
def test_bytes_are_those_of_the_keys_that_are_read(lists: int, page_size: int, tmp_path: Path) -> None:
    """Check against the plan's mask: a key counts once per KV head, or once per query head with its own list."""
    call = replace(made(tmp_path).calls(200)[0], kv_state=None)
    plan = random_lists(call, 200, 48, lists, page_size)
    read = plan.mask()[:, :, 0]
    if lists < 4:
        read = read.unflatten(1, (2, 2)).any(2)
    assert bytes_of(call, plan) == int(read.sum()) * (16 + 16) * 4
    assert plan.pages is not None and plan.counts is not None and plan.pages.shape == (2, lists, -(-48 // page_size))
    for row in plan.pages.flatten(0, 1).tolist():
        assert row == sorted(set(row)) and row[-1] == 199 // page_size, "its own pages, the current one among them"
    with pytest.raises(UnsupportedCallError, match="the budget is more than 200 tokens"):
        random_lists(call, 200, 500, lists, page_size)


def test_a_stack_runs_every_layer_in_its_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse layer reads what the selecting layer before it chose, from that layer's own queries and keys."""
    benchmark = made(tmp_path, "delta")
    config, calls, outputs = benchmark.methods["delta"], benchmark.calls(200), list[torch.Tensor]()
    attend = page_decode.OP.attend

    def attended(*arguments: Any) -> Any:
        result = attend(*arguments)
        outputs.append(result[0])
        return result

    monkeypatch.setattr(page_decode.OP, "attend", attended)
    plans = run_stack(config, calls)
    assert [plan.pages is None for plan in plans] == [True, True, False, False, True, False]
    assert [plan.wants_logits for plan in plans] == [False, True, False, False, True, False]
    for layer, chooser in ((2, 1), (3, 1), (5, 4)):
        call = calls[chooser]
        k = call.k[:, :, :200].repeat_interleave(2, 1)
        probability = (call.q @ k.transpose(-1, -2) * call.scale).softmax(-1)[:, :, 0].amax(1)
        scores = torch.nn.functional.pad(probability, (0, 8)).unflatten(-1, (13, 16)).sum(-1)
        scores[:, -1] = torch.inf
        expected = scores.topk(2).indices.sort(-1).values
        plan = plans[layer]
        assert plan.pages is not None and torch.equal(plan.pages[:, 0].long(), expected)
    for call, plan, output in zip(calls, plans, outputs, strict=True):
        torch.testing.assert_close(output, attend(call, plan, "reference")[0], atol=1e-5, rtol=1e-5)


def test_the_roles_of_a_configuration(tmp_path: Path) -> None:
    benchmark = made(tmp_path, "delta", "quest")
    assert roles_of(benchmark, "delta") == {"select": 4, "sparse": 5}
    assert roles_of(benchmark, "quest") == {"layer": 5}
    forward_state = forward_state_to(benchmark.methods["delta"], benchmark.calls(200)[0], 5)
    assert len(forward_state) == 1
    assert not forward_state_to(benchmark.methods["delta"], benchmark.calls(200)[0], 1)


def test_what_stays_dense_is_our_dense_decode(tmp_path: Path) -> None:
    """The budget covers all keys, or the cache is too short."""
    benchmark = made(tmp_path, "delta")
    plans = run_stack(
        benchmark.methods["delta"],
        [
            replace(call, k=call.k[:, :, :20], v=call.v[:, :, :20], kv_end=torch.tensor(20))
            for call in benchmark.calls(200)
        ],
    )
    assert all(plan.pages is None and not plan.wants_logits for plan in plans)


def test_out_of_memory_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = page_decode.OP.attend

    def attended(call: Any, plan: PagePlan, *rest: Any) -> Any:
        if plan.pages is None:
            raise torch.OutOfMemoryError("much")
        return attend(call, plan, *rest)

    monkeypatch.setattr(page_decode.OP, "attend", attended)
    result = bench_decode(made(tmp_path))
    assert result.skipped["page_decode: out of memory"] == [200] and {row.dense for row in result.rows} == {None}
    monkeypatch.setattr(Benchmark, "calls", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("more")))
    result = bench_decode(made(tmp_path))
    assert not result.rows and list(result.skipped) == ["caches of all layers: out of memory, ask for fewer --layers"]


def test_a_kernel_of_others_that_fails_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("No available kernel.\nMore.")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fail)
    result = bench_decode(made(tmp_path))
    assert result.skipped["sdpa: No available kernel."] == [200] and result.rows[0].kind == "dense"


def test_words_of_the_command_line(tmp_path: Path) -> None:
    assert architecture_of("llama-3.1-8b") == ARCHITECTURES["llama-3.1-8b"]
    assert architecture_of("llama-3.1-8b", 4).layers == 4
    with pytest.raises(TaskError, match=r"--shape: expected llama-3.1-8b, .* did you mean 'llama-3.1-8b'"):
        architecture_of("llama-3.1")
    (tmp_path / "prefill.yaml").write_text("prefill: {method: flexprefill}")
    with pytest.raises(TaskError, match=r"prefill.yaml: has no sparse decode method to time"):
        methods_of([str(tmp_path / "prefill.yaml")], TINY)
    (tmp_path / "far.yaml").write_text("decode: {method: delta, roles: {full: [0], select: [1, 9]}}")
    with pytest.raises(ConfigError, match=r"far.yaml: decode.roles.select: the model has no layer 9"):
        methods_of([str(tmp_path / "far.yaml")], TINY)


@pytest.mark.gpu
def test_on_a_gpu_every_step_is_captured(tmp_path: Path) -> None:
    benchmark = made(tmp_path, "delta", "tidal", "quest", device="cuda", dtype=torch.float16)
    result = bench_decode(benchmark)
    assert len(result.rows) >= 15 and all(row.ms > 0 for row in result.rows), result.skipped
