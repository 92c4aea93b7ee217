"""Attention sinks in the softmax (gpt-oss): every op with sinks, and a model's full layers, against the formula."""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from builders.plans import random_blocks, random_pages, random_token_blocks
from builders.rings import run_ring
from builders.spans import batch_of, close, fed, generated, shape_of
from calls import decode_call, make_call
from families import gpt_oss
from method_table import in_folder, write_plans
from oracles.sinks import Masks, attention, sinks_by_masks
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from benchmarks.support.probe import settings_of
from sparse_patch import capture_plans, patched, span_cache, sparsity_report
from sparse_patch.call import PHASES, AttentionCall, Phase
from sparse_patch.config import PatchConfig
from sparse_patch.integration.caches.rings import RingLayer
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.methods.base.registry import registry
from sparse_patch.methods.base.settings import Method
from sparse_patch.methods.base.spans import SpanMethod
from sparse_patch.model_shape import ModelShape
from sparse_patch.ops.attention import dense, page_decode, table
from sparse_patch.ops.attention.op import Attended
from sparse_patch.ops.attention.span_ring import RingLayout
from sparse_patch.plans import BlockGrid, BlockPlan, Dense, PagePlan, Plan, SpanPlan, TokenBlockPlan

pytestmark = pytest.mark.usefixtures("one_thread")

# --- the formula -----------------------------------------------------------------------------------------------------


def test_a_sink_of_minus_infinity_changes_nothing_even_without_a_key() -> None:
    out, lse = torch.tensor([[[[1.0], [0.0]]]]), torch.tensor([[[0.5, -torch.inf]]])
    attended = Attended(out, lse).with_sinks(torch.tensor([-torch.inf]))
    assert torch.equal(attended.out, out) and attended.lse is not None and torch.equal(attended.lse, lse)


# --- the ops ---------------------------------------------------------------------------------------------------------

SINKS = torch.tensor([3.0, -2.0, 0.5, 40.0])  # of four heads; logits lie in the tens
SPANS = (3, 0), (9, 21)
RINGS = {"ring, one token": [1] * 25, "ring, more tokens": [13, 12]}
Calls, Plans = Callable[[torch.dtype], AttentionCall], Callable[[AttentionCall], Any]


def _prompt(length: int, dtype: torch.dtype) -> AttentionCall:
    """Two rows; the second begins with queries that have no key."""
    return make_call(length, row_starts=[0, 19], dtype=dtype)


def _step(dtype: torch.dtype) -> AttentionCall:
    return decode_call(60, queries=5, row_starts=[0, 57], dtype=dtype)


OPS: dict[str, tuple[Calls, Plans]] = {
    "blocks": (partial(_prompt, 70), lambda call: random_blocks(call, 16, 0.3)),
    "columns": (partial(_prompt, 70), lambda call: random_blocks(call, 16, 0.2, columns=9)),
    "token blocks": (partial(_prompt, 150), random_token_blocks),
    "pages": (_step, lambda call: random_pages(call, 2, 8, most=4)),
    "every page": (_step, lambda call: PagePlan.every(call, wants_logits=True)),
    "spans": (partial(_prompt, 70), lambda call: SpanPlan.of(call, *SPANS)),
    **dict.fromkeys(RINGS, (partial(_prompt, 25), lambda call: SpanPlan.of(call, *SPANS))),
}


def _attended(op: str, call: AttentionCall, plan: Any, backend: str) -> Attended:
    if op not in RINGS:
        return table.attend(call, plan, backend, return_lse=True)
    layout = RingLayout.of(*SPANS, room=call.kv_length)
    return Attended(*run_ring(call, layout, RINGS[op], backend)[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_an_op_with_sinks_is_the_softmax_with_one_more_logit(op: str, backend: str, dtype: torch.dtype) -> None:
    make, plan_of = OPS[op]
    call = make(dtype)
    plan = plan_of(call)
    mask = plan.mask()
    expected, expected_lse = attention(call.q, call.k, call.v, mask, call.scale, SINKS)
    without = _attended(op, call, plan, backend)
    found = without.with_sinks(SINKS)
    assert found.lse is not None and found.out.dtype == dtype and found.logits is without.logits
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3  # of values of 3; the output was rounded before as well
    torch.testing.assert_close(found.out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.lse.double(), expected_lse, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(without.out.double(), expected, atol=0.1), "the sinks matter"
    empty = ~mask.any(-1)
    assert empty.any(), "some query has no key"
    assert not found.out[empty].any()
    assert torch.equal(found.lse[empty], SINKS[None, :, None].expand_as(found.lse)[empty])


# --- a model ---------------------------------------------------------------------------------------------------------

LENGTH, PAD, NEW = 200, 30, 3
TOTAL = LENGTH + NEW
FULL = [1, 3]  # layers; the others have windows
ONE_PIECE, CHUNKS = [LENGTH, 1, 1, 1], [80, 75, 45, 1, 1, 1]
SPAN_METHODS = [name for name, method in registry().items() if issubclass(method, SpanMethod)]
METHODS = sorted(set(registry()) - {"dense"})
BOTH = {"prefill": "flexprefill", "decode": "quest"}  # a method for each phase
Cached = Callable[[PreTrainedModel], Any]
CACHES: dict[str, Cached] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=TOTAL + 20),
    "ring": lambda model: span_cache(model, TOTAL),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A tiny gpt-oss whose sinks are as large as its logits; it runs its eager attention."""
    model = gpt_oss()
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2
    assert model.config._attn_implementation == "eager"
    return model


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the files that settings name."""
    folder = tmp_path_factory.mktemp("plans")
    write_plans(folder, shape_of(model))
    return folder


@pytest.fixture(scope="module")
def eager(model: PreTrainedModel) -> torch.Tensor:
    """The unpatched logits of `batch()`."""
    return _fed(model)


def batch(pad: int = PAD) -> dict[str, torch.Tensor]:
    """Two rows; the second is padded on the left."""
    return batch_of(TOTAL, pad)


def _fed(model: PreTrainedModel, pieces: list[int] = ONE_PIECE, cache: str = "dynamic") -> torch.Tensor:
    return fed(model, batch(), pieces, CACHES[cache](model))


def _config(model: PreTrainedModel, folder: Path, keeps_all: bool, *names: str) -> dict[str, Any]:
    """Settings of methods: they leave keys out, or keep all of them."""
    config: dict[str, Any] = {"on_unsupported": "error"}
    for name in names:
        phases = registry()[name].phases
        settings = settings_of(model)[name][keeps_all]
        config["both" if len(phases) == 2 else phases[0]] = in_folder(settings, folder)
    return config


def _sparse_calls(model: PreTrainedModel) -> dict[Phase, int]:
    """How often each full layer ran sparsely. The other layers never did, and only because of their windows."""
    report = sparsity_report(model)
    assert report.fallbacks() == {}
    for layer, phase in product(report.layers, PHASES):
        if layer.layer not in FULL:
            counts = layer.phase(phase)
            assert set(counts.dense) <= {"sliding-window layer", f"no {phase} method"}
            assert sum(counts.dense.values()) == counts.calls
    found = [{phase: report.layers[layer].phase(phase).sparse_calls for phase in PHASES} for layer in FULL]
    assert found[0] == found[1]
    return found[0]


def _sparse_and_oracle(
    model: PreTrainedModel, config: Any, pieces: list[int] = ONE_PIECE, cache: str = "dynamic"
) -> tuple[torch.Tensor, torch.Tensor, dict[Phase, int]]:
    """Patched logits, logits of the oracle under the masks of the same plans, and the sparse calls of a full layer."""
    with patched(model, config), capture_plans(model) as plans:
        found, calls = _fed(model, pieces, cache), _sparse_calls(model)
    with sinks_by_masks(model, _masks(plans)):
        return found, _fed(model, pieces), calls


def _masks(plans: dict[int, list[tuple[Phase, Plan]]]) -> Masks:
    """What calls read by their plans; None for a dense call."""
    return {
        layer: [None if isinstance(plan, Dense) else plan.mask() for _, plan in made] for layer, made in plans.items()
    }


def test_the_oracle_is_the_models_eager_attention(model: PreTrainedModel, eager: torch.Tensor) -> None:
    with sinks_by_masks(model, {}):
        close(_fed(model), eager, batch()["attention_mask"])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_the_oracle_under_its_own_masks(
    name: str, model: PreTrainedModel, eager: torch.Tensor, folder: Path
) -> None:
    found, expected, calls = _sparse_and_oracle(model, _config(model, folder, False, name))
    phases = registry()[name].phases
    assert calls == {"prefill": int("prefill" in phases), "decode": NEW * ("decode" in phases)}
    close(found, expected, batch()["attention_mask"])
    assert not torch.allclose(found[0], eager[0], atol=0.05), "it was sparse"


@pytest.mark.parametrize("name", METHODS)
def test_a_full_budget_is_eager(name: str, model: PreTrainedModel, eager: torch.Tensor, folder: Path) -> None:
    with patched(model, _config(model, folder, True, name)):
        close(_fed(model), eager, batch()["attention_mask"])


@pytest.mark.parametrize(
    "names, pieces, cache",
    [
        *((tuple(BOTH.values()), pieces, cache) for pieces, cache in ((CHUNKS, "dynamic"), (ONE_PIECE, "static"))),
        *((names, CHUNKS, "static") for names in (("xattention", "delta"), ("minference", "kinetics"), ("infllmv2",))),
        *(((name,), pieces, "ring") for name in SPAN_METHODS for pieces in (ONE_PIECE, CHUNKS)),
    ],
    ids=str,
)
def test_chunks_and_other_caches_are_the_oracle(
    names: tuple[str, ...], pieces: list[int], cache: str, model: PreTrainedModel, folder: Path
) -> None:
    """Some methods leave nothing out of a first chunk; that chunk is then dense."""
    found, expected, calls = _sparse_and_oracle(model, _config(model, folder, False, *names), pieces, cache)
    assert 1 <= calls["prefill"] <= len(pieces) - NEW and calls["decode"] == NEW
    close(found, expected, batch()["attention_mask"])


@pytest.mark.parametrize("name", SPAN_METHODS)
def test_generate_on_a_ring_is_the_oracle(name: str, model: PreTrainedModel, folder: Path) -> None:
    with patched(model, _config(model, folder, False, name)), capture_plans(model) as plans:
        found = generated(model, batch(), 6)
        assert _sparse_calls(model) == {"prefill": 1, "decode": 5}
    assert [isinstance(layer, RingLayer) for layer in found.past_key_values.layers] == [False, True] * 2
    with sinks_by_masks(model, _masks(plans)):
        expected = generated(model, batch(), 6)
    assert torch.equal(found.sequences, expected.sequences)
    close(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_padded_row_generates_what_it_generates_alone(
    cache: str | None, model: PreTrainedModel, folder: Path
) -> None:
    together = batch()
    alone = {name: tensor[1:, PAD:] for name, tensor in together.items()}
    options: dict[str, Any] = {"cache_implementation": cache, "disable_compile": True}
    with patched(model, _config(model, folder, False, *BOTH.values())):
        found, expected = (generated(model, rows, 5, **options) for rows in (together, alone))
        assert _sparse_calls(model) == {"prefill": 2, "decode": 8}
    close(torch.stack(found.logits)[:, 1:], torch.stack(expected.logits))


# --- every key, by every kind of plan --------------------------------------------------------------------------------


def _all_blocks_of_tokens(call: AttentionCall) -> TokenBlockPlan:
    return random_token_blocks(call, init=call.kv_length, chance=0.0)


def _all_pages(call: AttentionCall) -> PagePlan:
    pages = torch.arange(-(-call.kv_length // 8), dtype=torch.int32).expand(len(call.q), 2, -1)
    counts = (-(-call.lengths() // 8)).int()[:, None].expand(-1, 2)
    return PagePlan.of(call, pages.contiguous(), counts.contiguous(), 8)


def _all_as_columns(call: AttentionCall) -> BlockPlan:
    grid = BlockGrid.of(call, 16)
    diagonal = grid.query_block_ids[..., None] == torch.arange(grid.num_key_blocks)
    heads = call.q.shape[1]
    columns = torch.arange(call.kv_length).expand(len(call.q), heads, -1)
    return BlockPlan.from_blocks(diagonal[:, None].expand(-1, heads, -1, -1), grid, columns)


EVERY_KEY: dict[str, Callable[[AttentionCall], Plan]] = {
    "blocks": lambda call: BlockPlan.every(call, 16),
    "columns": _all_as_columns,
    "token blocks": _all_blocks_of_tokens,
    "pages": _all_pages,
    "every page": PagePlan.every,
    "spans": lambda call: SpanPlan.of(call, [0, 3], [None, 1000]),
}


class ByPlan(Method):
    """Read every key, by one kind of plan."""

    phases = PHASES
    summary = "for tests"
    paper = "none"
    method: Literal["by_plan"] = "by_plan"
    by: str

    def bind(self, shape: ModelShape) -> BoundMethod:
        return BoundByPlan(self)


class BoundByPlan(BoundMethod):
    settings: ByPlan

    def __init__(self, settings: ByPlan) -> None:
        self.settings = settings

    def plan(self, call: AttentionCall) -> Plan:
        return EVERY_KEY[self.settings.by](call)


READINGS = [("blocks", "every page"), ("columns", "pages"), ("token blocks", "every page"), ("spans", "spans")]
READING = pytest.mark.parametrize("prefill, decode", READINGS)


def _reading(prefill: str, decode: str, **settings: Any) -> PatchConfig:
    return PatchConfig(prefill=ByPlan(by=prefill), decode=ByPlan(by=decode), source="test", **settings)


@READING
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pieces", [ONE_PIECE, CHUNKS], ids=str)
def test_every_key_by_a_plan_is_eager(
    prefill: str, decode: str, cache: str, pieces: list[int], model: PreTrainedModel, eager: torch.Tensor
) -> None:
    with patched(model, _reading(prefill, decode)):
        close(_fed(model, pieces, cache), eager, batch()["attention_mask"])
        assert _sparse_calls(model) == {"prefill": len(pieces) - NEW, "decode": NEW}


@READING
def test_every_key_without_the_sinks_is_far_from_eager(
    prefill: str, decode: str, model: PreTrainedModel, eager: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards the tests above: they would notice missing sinks."""
    monkeypatch.setattr(Attended, "with_sinks", lambda attended, sinks: attended)
    with patched(model, _reading(prefill, decode)):
        found = _fed(model)
    for part in (slice(LENGTH), slice(LENGTH, None)):
        assert (found - eager)[0, part].abs().max() > 0.1


@pytest.mark.parametrize("pieces", [ONE_PIECE, CHUNKS], ids=str)
def test_a_ring_that_forgets_nothing_is_eager(pieces: list[int], model: PreTrainedModel, eager: torch.Tensor) -> None:
    """The first piece is dense by the method's choice; the ring serves all later pieces."""
    everything = {"method": "streamingllm", "sink": 5, "window": 400}
    with patched(model, {"both": everything, "on_unsupported": "error"}):
        close(_fed(model, pieces, "ring"), eager, batch()["attention_mask"])
        assert _sparse_calls(model) == {"prefill": len(pieces) - NEW - 1, "decode": NEW}


# --- around it -------------------------------------------------------------------------------------------------------


def test_unpatching_restores_every_bit(model: PreTrainedModel, eager: torch.Tensor, folder: Path) -> None:
    with patched(model, _config(model, folder, False, *BOTH.values())):
        assert not torch.equal(_fed(model), eager)
    assert torch.equal(_fed(model), eager)


@torch.no_grad()
def test_attention_weights_are_those_of_before(model: PreTrainedModel, folder: Path) -> None:
    ids = batch(pad=0)["input_ids"]
    expected = model(ids, output_attentions=True)
    config = {**_config(model, folder, False, *BOTH.values()), "on_unsupported": "silent"}
    with patched(model, config):
        found = model(ids, output_attentions=True)
        fallbacks = sparsity_report(model).fallbacks("prefill")
    assert len(found.attentions) == 4 and all(map(torch.equal, found.attentions, expected.attentions))
    assert torch.equal(found.logits, expected.logits) and fallbacks == {"output_attentions": len(FULL)}


def test_dense_best_leaves_prefill_to_the_model(
    model: PreTrainedModel, eager: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense kernels give no LSE. Decode runs on the kernel for pages, which gives one."""
    monkeypatch.setattr(dense, "fastest", lambda call: "sdpa")
    monkeypatch.setattr(page_decode, "fastest", lambda call, plan: "triton")
    with patched(model, {"both": {"method": "dense"}, "dense": "best"}):
        found = _fed(model)
        layers = sparsity_report(model).layers
    assert torch.equal(found[:, :LENGTH], eager[:, :LENGTH])
    close(found, eager, batch()["attention_mask"])
    assert [layer.prefill.dense_kernels for layer in layers] == [{}] * 4
    assert [layer.decode.dense_kernels for layer in layers] == [{}, {"page_decode": NEW}] * 2


@pytest.mark.parametrize("backend", ["flash", "triton", "torch", "reference"])
def test_every_backend_is_eager(backend: str, model: PreTrainedModel) -> None:
    """`flash` is only for GPUs. What it does not serve is dense, and counted."""
    prompt = batch_of(25)
    expected = fed(model, prompt, [24, 1], DynamicCache(config=model.config))
    for plans in READINGS[1:]:
        with patched(model, _reading(*plans, backend=backend, on_unsupported="silent")):
            found = fed(model, prompt, [24, 1], DynamicCache(config=model.config))
            assert backend == "flash" or _sparse_calls(model) == {"prefill": 1, "decode": 1}
        close(found, expected, prompt["attention_mask"])


def test_sinks_that_need_gradients_are_dense() -> None:
    """Only the sinks need gradients, in a layer that gets no gradient from below."""
    model = gpt_oss().requires_grad_(False)
    sinks: nn.Parameter = model.model.layers[1].self_attn.sinks
    sinks.requires_grad_(True)
    ids, gradients = batch(pad=0)["input_ids"], []
    for method in ({"method": "dense"}, {"method": "streamingllm", "sink": 4, "window": 20}):
        sinks.grad = None
        with patched(model, {"prefill": method, "on_unsupported": "silent"}):
            model(ids, labels=ids).loss.backward()
            assert sparsity_report(model).layers[1].prefill.sparse_calls == 0
        assert sinks.grad is not None
        gradients.append(sinks.grad)
    assert torch.equal(*gradients)
