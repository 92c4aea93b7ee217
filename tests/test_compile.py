"""`torch.compile` of a whole patched model: sparse where its plan can be traced, else dense and counted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama
from method_table import DECODE_METHODS, PREFILL_METHODS, SMALL_MODEL, SPAN_METHODS, MethodCase, write_plans
from transformers import DynamicCache, PreTrainedModel, StaticCache

from sparse_patch import patched, sparsity_report

WITHOUT_KERNELS = "prefill inside torch.compile without Triton's kernels"
PADDED = "padding mask inside torch.compile (pass none with prompts of one length)"


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> PreTrainedModel:
    return llama(layers=SMALL_MODEL.num_layers)


def prompts(rows: int = 2, length: int = 150) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(3, 90, (rows, length))


def compiled(model: PreTrainedModel, **settings: Any) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True, **settings)


def settings_of(case: MethodCase, folder: Path) -> dict[str, Any]:
    write_plans(folder, SMALL_MODEL)
    file = case.small.get("calibration")
    return {**case.small, "calibration": str(folder / file)} if file else case.small


@pytest.mark.parametrize("case", PREFILL_METHODS, ids=lambda case: case.name)
@torch.no_grad()
def test_plans_of_blocks_are_dense_without_kernels(case: MethodCase, model: PreTrainedModel) -> None:
    """What the model gives unpatched, the reason once for each layer, however often the graph runs; no warning."""
    ids = prompts()
    expected = model(ids).logits
    with patched(model, {"prefill": case.small}):
        run = compiled(model)
        for _ in range(3):
            torch.testing.assert_close(run(ids).logits, expected)
        report = sparsity_report(model)
    assert report.fallbacks("prefill") == {WITHOUT_KERNELS: SMALL_MODEL.num_layers}
    assert all(layer.compiled and layer.prefill.calls == 0 for layer in report.layers)


@pytest.mark.parametrize("case", SPAN_METHODS, ids=lambda case: case.name)
@torch.no_grad()
def test_spans_are_sparse_in_a_graph(case: MethodCase, model: PreTrainedModel, tmp_path: Path) -> None:
    ids = prompts()
    unpatched = model(ids).logits
    with patched(model, {"both": settings_of(case, tmp_path)}):
        eager = model(ids).logits
        torch.testing.assert_close(compiled(model)(ids).logits, eager, atol=1e-5, rtol=1e-5)
        assert not sparsity_report(model).fallbacks()
    assert (eager - unpatched).abs().max() > 1e-3, "the spans left nothing out"


@torch.no_grad()
def test_lengths_may_change(model: PreTrainedModel) -> None:
    """The second length makes a graph of any length; the third has no graph of its own."""
    frames = torch._dynamo.testing.CompileCounter()
    spans = {"method": "streamingllm", "sink": 3, "window": 40}
    with patched(model, {"both": spans}):
        run = torch.compile(model, backend=frames, fullgraph=True)
        for length in (150, 170, 190):
            ids = prompts(length=length)
            torch.testing.assert_close(run(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert frames.frame_count <= 2


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padding_mask_is_dense(side: str, model: PreTrainedModel) -> None:
    """A graph cannot read on the host where the padding lies."""
    ids, mask = prompts(), torch.ones(2, 150, dtype=torch.int64)
    mask[0, slice(9) if side == "left" else slice(-9, None)] = 0
    expected = model(ids, attention_mask=mask).logits
    with patched(model, {"both": {"method": "streamingllm", "sink": 3, "window": 40}}):
        logits = compiled(model)(ids, attention_mask=mask).logits
        assert sparsity_report(model).fallbacks("prefill") == {PADDED: SMALL_MODEL.num_layers}
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_a_static_cache_of_the_callers_making(model: PreTrainedModel) -> None:
    """How much it holds is on the device only: the prompt is dense, the token after it sparse."""
    ids = prompts()
    cache = StaticCache(config=model.config, max_cache_len=200)
    expected = [model(ids, past_key_values=cache).logits, model(ids[:, :1], past_key_values=cache).logits]
    method = {"method": "quest", "budget": 400, "page_size": 8, "min_length": 0}
    with patched(model, {"prefill": {"method": "streamingllm", "sink": 3, "window": 40}, "decode": method}):
        run, cache = compiled(model), StaticCache(config=model.config, max_cache_len=200)
        found = [run(ids, past_key_values=cache).logits, run(ids[:, :1], past_key_values=cache).logits]
        assert list(sparsity_report(model).fallbacks("prefill")) == ["prompt of a static cache inside torch.compile"]
        assert not sparsity_report(model).fallbacks("decode")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [*DECODE_METHODS, *SPAN_METHODS], ids=lambda case: case.name)
@torch.no_grad()
def test_steps_of_a_loop_of_ones_own(case: MethodCase, model: PreTrainedModel, tmp_path: Path) -> None:
    ids = prompts()
    phase = "both" if case in SPAN_METHODS else "decode"
    logits = []
    with patched(model, {phase: settings_of(case, tmp_path)}):
        for run in (model, compiled(model)):
            cache = DynamicCache(config=model.config)
            model(ids[:, :140], past_key_values=cache)
            logits.append([run(ids[:, i : i + 1], past_key_values=cache).logits for i in range(140, 143)])
        assert not sparsity_report(model).fallbacks("decode")
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_generate_with_a_compiled_forward(model: PreTrainedModel) -> None:
    """Masks of a static cache are made outside of the graph, so prompt and tokens are sparse, with padding too."""
    ids, mask = prompts(), torch.ones(2, 150, dtype=torch.int64)
    mask[0, :9] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    with patched(model, {"both": {"method": "streamingllm", "sink": 3, "window": 40}}):
        expected = model.generate(ids, **settings)
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)  # type: ignore[method-assign]
        found = model.generate(ids, **settings)
        del model.forward
        assert not sparsity_report(model).fallbacks()
    assert torch.equal(found, expected)


@torch.no_grad()
def test_on_unsupported_error_inside_a_graph(model: PreTrainedModel) -> None:
    strict = {"prefill": {"method": "a_shape", "min_length": 0}, "on_unsupported": "error"}
    with patched(model, strict), pytest.raises(Exception, match="without Triton"):
        compiled(model)(prompts())
