"""The hook on real model classes: what runs sparsely, what goes dense and why, and that nothing goes dense silently."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, vlm
from torch import nn
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from sparse_patch import PatchError, UnsupportedCallError, capture_plans, patched, sparsity_report
from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention import dense as dense_kernels
from sparse_patch.plans import BlockPlan

SPARSE = {"prefill": {"method": "flexprefill", "block_size": 16, "min_budget": 16, "gamma": 0.5, "min_length": 0}}
FULL = {"prefill": {**SPARSE["prefill"], "min_budget": 10_000, "max_budget": None}}
LENGTH = 150
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def llama() -> PreTrainedModel:
    return FAMILIES["llama"]()


def ids_of(model: nn.Module, batch: int = 1, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, model.config.get_text_config().vocab_size, (batch, length))


def logits_of(model: nn.Module, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_full_attention_layers_of_every_family_run_sparsely(family: str) -> None:
    """Sparse exactly in the layers without a window; the logits are finite and differ from dense ones."""
    model = FAMILIES[family]()
    ids = ids_of(model)
    dense = logits_of(model, input_ids=ids)
    with patched(model, SPARSE), warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse = logits_of(model, input_ids=ids)
        report = sparsity_report(model)
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [
        "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    ] * len(report.layers)
    for layer, kind in zip(report.layers, kinds, strict=True):
        if kind == "full_attention":
            assert layer.prefill.sparse_calls == 1 and 0 < layer.prefill.density < 1
        else:
            assert layer.prefill.dense == {"sliding-window layer": 1}
    assert sparse.isfinite().all()
    assert torch.equal(sparse, dense) != ("full_attention" in kinds)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_equals_dense(family: str) -> None:
    model = FAMILIES[family]()
    ids = ids_of(model)
    dense = logits_of(model, input_ids=ids)
    for config in (FULL, {"prefill": {**SPARSE["prefill"], "gamma": 1.0}}):
        with patched(model, config):
            assert torch.equal(logits_of(model, input_ids=ids), dense)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "minicpm3", "granite"])
def test_a_padded_row_equals_the_same_row_alone(family: str) -> None:
    model = FAMILIES[family]()
    ids = ids_of(model, batch=3)
    mask = torch.ones_like(ids)
    mask[1, :37], mask[2, :64] = 0, 0
    with patched(model, SPARSE):
        together = logits_of(model, input_ids=ids, attention_mask=mask, position_ids=positions(mask))
        assert sum(layer.prefill.sparse_calls for layer in sparsity_report(model).layers) > 0
        for row, start in enumerate((0, 37, 64)):
            alone = logits_of(model, input_ids=ids[row : row + 1, start:])
            torch.testing.assert_close(together[row : row + 1, start:], alone, atol=2e-4, rtol=1e-4)


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def test_generate_pads_and_prefills_sparsely(llama: PreTrainedModel) -> None:
    ids = ids_of(llama, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    with patched(llama, SPARSE):
        together = llama.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        alone = llama.generate(ids[1:, 50:], max_new_tokens=4, do_sample=False)
        report = sparsity_report(llama)
    assert torch.equal(together[1, LENGTH:], alone[0, LENGTH - 50 :])
    assert report.layers[0].prefill.sparse_calls == 2 and report.layers[0].decode.calls == 6
    assert report.fallbacks() == {}


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_chunks_select_with_their_own_queries(llama: PreTrainedModel, cache_class: type) -> None:
    """Each chunk is planned on the grid of the whole prompt; full budgets give the logits of one dense forward."""
    ids = ids_of(llama)
    dense = logits_of(llama, input_ids=ids)
    for config, exact in ((SPARSE, False), ({"prefill": {**SPARSE["prefill"], "gamma": 1.0}}, True)):
        cache = (
            cache_class(config=llama.config)
            if cache_class is DynamicCache
            else cache_class(config=llama.config, max_cache_len=LENGTH + 30)
        )
        with patched(llama, config), capture_plans(llama) as plans:
            chunks = [logits_of(llama, input_ids=part, past_key_values=cache) for part in ids.split([70, 45, 35], 1)]
            report = sparsity_report(llama)
        error = (torch.cat(chunks, 1) - dense).abs().max()
        assert (error < 1e-4) == exact
        starts = [plan.grid.q_start for _, plan in plans[0] if isinstance(plan, BlockPlan)]
        assert starts == ([] if exact else [0, 70, 115])
        assert report.fallbacks() == {}


def test_the_tail_of_a_static_cache_is_never_read(llama: PreTrainedModel) -> None:
    ids = ids_of(llama)
    results = []
    for poison in (0.0, 1e4):
        cache = StaticCache(config=llama.config, max_cache_len=LENGTH + 40)
        cache.early_initialization(1, llama.config.num_key_value_heads, llama.config.head_dim, torch.float32, "cpu")
        for layer in cache.layers:
            layer.keys.fill_(poison), layer.values.fill_(poison)
        with patched(llama, SPARSE):
            results.append(logits_of(llama, input_ids=ids, past_key_values=cache))
            assert sparsity_report(llama).layers[0].prefill.sparse_calls == 1
    assert torch.equal(*results)


def test_layers_not_selected_stay_dense(llama: PreTrainedModel) -> None:
    with patched(llama, SPARSE, prefill={"layers": [1]}):
        logits_of(llama, input_ids=ids_of(llama))
        layers = sparsity_report(llama).layers
    assert [layer.prefill.sparse_calls for layer in layers] == [int(layer.layer == 1) for layer in layers]
    assert layers[0].prefill.dense == {"layer not selected": 1} and layers[0].prefill_method is None


def test_inference_mode_works(llama: PreTrainedModel) -> None:
    ids = ids_of(llama)
    torch.set_num_threads(2)
    with patched(llama, SPARSE):
        expected = logits_of(llama, input_ids=ids)
        with torch.inference_mode():
            assert torch.equal(llama(ids).logits, expected)


FallbackCase = tuple[str, Callable[[], PreTrainedModel], Callable[[PreTrainedModel], dict[str, Any]], str]


def _holes(model: PreTrainedModel) -> dict[str, Any]:
    mask = torch.ones(1, LENGTH, dtype=torch.long)
    mask[0, 100:] = 0
    return {"input_ids": ids_of(model), "attention_mask": mask}


def _packed(model: PreTrainedModel) -> dict[str, Any]:
    steps = torch.arange(LENGTH)[None]
    return {"input_ids": ids_of(model), "position_ids": torch.where(steps < 80, steps, steps - 80), "use_cache": False}


def _own_mask(model: PreTrainedModel) -> dict[str, Any]:
    causal = torch.ones(LENGTH, LENGTH).tril()
    return {"input_ids": ids_of(model), "attention_mask": ((1 - causal) * -1e9)[None, None]}


def _images(model: PreTrainedModel) -> dict[str, Any]:
    """Two blocks of tokens that see each other in both directions, as image tokens do."""
    kinds = torch.zeros(1, LENGTH, dtype=torch.long)
    kinds[0, 10:30] = 1
    return {"input_ids": ids_of(model), "token_type_ids": kinds}


def with_weights() -> PreTrainedModel:
    """A model whose config asks for attention weights."""
    model = FAMILIES["llama"]()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    return model


def with_own_sinks() -> PreTrainedModel:
    """A model whose attention has sinks that it does not pass to the attention function."""
    model = FAMILIES["llama"]()
    for layer in model.model.layers:
        layer.self_attn.sinks = nn.Parameter(torch.zeros(4))
    return model


FALLBACKS: list[FallbackCase] = [
    ("right padding or holes", FAMILIES["llama"], _holes, "padding that is not on the left"),
    ("packed sequences", FAMILIES["llama"], _packed, "mask is more than causal"),
    ("4-D mask", FAMILIES["llama"], _own_mask, "mask tensor passed by the caller"),
    (
        "sinks of its own",
        with_own_sinks,
        lambda model: {"input_ids": ids_of(model)},
        "attention sinks that are not handed",
    ),
    (
        "sinks of other heads",
        FAMILIES["llama"],
        lambda model: {"input_ids": ids_of(model), "s_aux": torch.zeros(3)},
        "attention sinks that are not one for each query head",
    ),
    ("image blocks", vlm, _images, "mask is more than causal"),
    (
        "attentions",
        FAMILIES["llama"],
        lambda model: {"input_ids": ids_of(model), "output_attentions": True},
        "output_attentions",
    ),
    ("attentions by the config", with_weights, lambda model: {"input_ids": ids_of(model)}, "output_attentions"),
]


@pytest.mark.parametrize("name, build, inputs_of, reason", FALLBACKS, ids=[case[0] for case in FALLBACKS])
def test_unsupported_calls_are_dense_counted_and_warned_about(
    name: str, build: Callable[[], PreTrainedModel], inputs_of: Callable[[PreTrainedModel], dict[str, Any]], reason: str
) -> None:
    model = build()
    inputs = inputs_of(model)
    dense = logits_of(model, **inputs)
    with patched(model, SPARSE), pytest.warns(UserWarning, match=reason) as caught:
        for _ in range(2):
            result = logits_of(model, **inputs)
        report = sparsity_report(model)
    assert torch.equal(result, dense)
    assert len([warning for warning in caught if "sparse_patch" in str(warning.message)]) == 1, "once per reason"
    counted = {key: count for key, count in report.fallbacks("prefill").items() if key.startswith(reason)}
    sparse_layers = [layer for layer in report.layers if not layer.prefill.dense]
    assert list(counted.values()) == [2 * len(sparse_layers)] and sparse_layers


@pytest.mark.parametrize("name, build, inputs_of, reason", FALLBACKS, ids=[case[0] for case in FALLBACKS])
def test_on_unsupported_error_and_silent(
    name: str, build: Callable[[], PreTrainedModel], inputs_of: Callable[[PreTrainedModel], dict[str, Any]], reason: str
) -> None:
    model = build()
    with patched(model, SPARSE, on_unsupported="error"), pytest.raises(UnsupportedCallError, match=reason):
        logits_of(model, **inputs_of(model))
    with patched(model, SPARSE, on_unsupported="silent"), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        logits_of(model, **inputs_of(model))
        assert sum(sparsity_report(model).fallbacks().values()) > 0


@torch.no_grad()
def test_the_config_gets_the_attention_weights_that_it_asks_for() -> None:
    model = with_weights()
    ids = ids_of(model)
    expected = model(ids).attentions
    with patched(model, SPARSE, on_unsupported="silent"):
        found = model(ids).attentions
    assert len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def test_training_is_dense_with_the_right_gradients(llama: PreTrainedModel) -> None:
    ids = ids_of(llama)
    gradients = []
    for config in (None, SPARSE):
        llama.zero_grad()
        if config is None:
            llama(ids, labels=ids).loss.backward()
        else:
            with patched(llama, config), pytest.warns(UserWarning, match="gradients are needed"):
                llama(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in llama.parameters() if parameter.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_paged_caches_are_refused(llama: PreTrainedModel) -> None:
    with patched(llama, SPARSE), pytest.raises(PatchError, match="continuous batching"):
        logits_of(llama, input_ids=ids_of(llama), cache=object())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_compiles_the_decode_step_of_a_static_cache(family: str) -> None:
    """As `generate` does on a GPU: the step compiles as one graph, and the dense config gives the same logits."""
    torch._dynamo.reset()
    model = FAMILIES[family]()
    options = CompileConfig(backend="eager", fullgraph=True)
    options._compile_all_devices = True
    ids = ids_of(model, batch=2, length=60)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0

    def steps() -> torch.Tensor:
        result = model.generate(
            **{"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False},
            **{"cache_implementation": "static", "compile_config": options},
            **{"output_logits": True, "return_dict_in_generate": True},
        )
        return torch.stack(result.logits)

    expected = steps()
    with patched(model, "dense.yaml"):
        assert torch.equal(steps(), expected)
        layer = sparsity_report(model).layers[0]
        assert layer.compiled and layer.decode.dense == {"method: dense": 5}, "the step was compiled, and is counted"
    with patched(model, SPARSE):
        assert not torch.equal(steps(), expected)
    assert torch.equal(steps(), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_backends_agree(llama: PreTrainedModel, backend: str) -> None:
    ids = ids_of(llama)
    with patched(llama, SPARSE):
        expected = logits_of(llama, input_ids=ids)
    with patched(llama, SPARSE, backend=backend):
        torch.testing.assert_close(logits_of(llama, input_ids=ids), expected, atol=1e-4, rtol=1e-4)


DENSE_WAYS: list[dict[str, Any]] = [
    {"prefill": {"method": "dense"}, "decode": {"method": "dense"}},
    {"decode": {"method": "dense"}},  # no prefill method
    {"prefill": {**SPARSE["prefill"], "min_length": 4096}},  # too short
]


@pytest.fixture
def fast_dense(monkeypatch: pytest.MonkeyPatch) -> list[AttentionCall]:
    """Pretend that the kernel `sdpa` is the fastest here; return the calls that ran on it."""
    served: list[AttentionCall] = []

    def fastest(call: AttentionCall) -> str | None:
        if dense_kernels.why_unsupported(call, "sdpa"):
            return None
        served.append(call)
        return "sdpa"

    monkeypatch.setattr(dense_kernels, "fastest", fastest)
    return served


@pytest.mark.parametrize("config", DENSE_WAYS, ids=["method dense", "no method", "short"])
def test_dense_best_changes_no_prompt_on_a_cpu(llama: PreTrainedModel, config: dict[str, Any]) -> None:
    ids = ids_of(llama)
    expected = logits_of(llama, input_ids=ids)
    with patched(llama, config, dense="best"):
        assert torch.equal(logits_of(llama, input_ids=ids), expected)
        assert sparsity_report(llama).layers[0].prefill.dense_kernels == {}


@pytest.mark.parametrize("config", DENSE_WAYS, ids=["method dense", "no method", "short"])
def test_dense_best_serves_both_phases_and_is_counted(
    llama: PreTrainedModel, config: dict[str, Any], fast_dense: list[AttentionCall]
) -> None:
    ids = ids_of(llama, batch=2)
    expected = llama.generate(ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with patched(llama, config, dense="best"):
        result = llama.generate(
            ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        report = sparsity_report(llama)
    torch.testing.assert_close(torch.stack(result.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert [call.layer for call in fast_dense] == [layer.layer for layer in report.layers]
    for layer in report.layers:
        assert layer.prefill.dense_kernels == {"sdpa": 1} and sum(layer.prefill.dense.values()) == 1
        assert layer.decode.dense_kernels == {"page_decode": 3} and layer.decode.calls == 3
    assert f"prefill: {len(report.layers)} of the dense calls on sdpa" in report.notes()


def test_dense_best_serves_layers_not_selected(llama: PreTrainedModel, fast_dense: list[AttentionCall]) -> None:
    with patched(llama, SPARSE, dense="best", prefill={"layers": [1]}):
        logits_of(llama, input_ids=ids_of(llama))
    assert 1 not in [call.layer for call in fast_dense] and fast_dense


def _left_padded(model: PreTrainedModel) -> dict[str, Any]:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :30] = 0
    return {"input_ids": ids_of(model, batch=2), "attention_mask": mask}


NOT_BEST: list[tuple[str, Callable[[], PreTrainedModel], Callable[[PreTrainedModel], dict[str, Any]]]] = [
    *((name, build, inputs_of) for name, build, inputs_of, _ in FALLBACKS),
    ("left padding", FAMILIES["llama"], _left_padded),
    ("softcap", FAMILIES["gemma2"], lambda model: {"input_ids": ids_of(model)}),
    ("sliding windows", FAMILIES["mistral"], lambda model: {"input_ids": ids_of(model)}),
]


@pytest.mark.parametrize("name, build, inputs_of", NOT_BEST, ids=[case[0] for case in NOT_BEST])
@pytest.mark.parametrize("layers", ["all", []], ids=["selected", "not selected"])
def test_dense_best_leaves_other_calls_as_they_are(
    name: str,
    build: Callable[[], PreTrainedModel],
    inputs_of: Callable[[PreTrainedModel], dict[str, Any]],
    layers: Any,
    fast_dense: list[AttentionCall],
) -> None:
    model = build()
    inputs = inputs_of(model)
    expected = logits_of(model, **inputs)
    with patched(model, {"prefill": {"method": "dense", "layers": layers}}, dense="best"):
        assert torch.equal(logits_of(model, **inputs), expected)
    assert not fast_dense


def test_dense_best_leaves_chunks_that_follow_and_gradients(
    llama: PreTrainedModel, fast_dense: list[AttentionCall]
) -> None:
    ids, cache = ids_of(llama), DynamicCache(config=llama.config)
    with patched(llama, {"prefill": {"method": "dense"}}, dense="best"):
        for part in ids.split([70, 80], 1):
            logits_of(llama, input_ids=part, past_key_values=cache)
        assert {call.q.shape[2] for call in fast_dense} == {70}
        llama(ids, labels=ids).loss.backward()
        assert {call.q.shape[2] for call in fast_dense} == {70}
