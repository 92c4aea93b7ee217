"""Sparse decode through the hook: caches, lists that travel through one forward, static caches and compiled steps."""

import copy
from typing import Any, Literal

import pytest
import torch
from builders.reports import counted_in_graphs
from families import FAMILIES, RECENT, llama
from method_table import DECODE_METHODS, SPAN_METHODS, TOKEN_METHODS, MethodCase
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from sparse_patch.call import AttentionCall, Slot, TensorSlot
from sparse_patch.config import PatchConfig
from sparse_patch.integration.caches.layers import FixedLayer, GrowingLayer
from sparse_patch.integration.caches.making import adopt, growing_cache
from sparse_patch.integration.names import HOOK, ON_KERNELS, hook_name
from sparse_patch.integration.patching import patched
from sparse_patch.integration.reporting import capture_plans, reset_report, sparsity_report
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.methods.base.registry import registry
from sparse_patch.methods.base.settings import DecodeMethod
from sparse_patch.model_shape import ModelShape
from sparse_patch.plans import PagePlan, Plan

PROMPT = 60
TOYS = TensorSlot("toy")
LIST: Slot[PagePlan] = Slot("list of the toy")


class Toy(DecodeMethod):
    """The first full layer selects the tokens with the highest logit of any head; the ones after it read them."""

    summary = "for tests"
    paper = "none"
    method: Literal["toy"] = "toy"
    tokens: int = 24
    min_length: int = 0

    def bind(self, shape: ModelShape) -> BoundMethod:
        return BoundToy(self)

    def choose(self, call: AttentionCall, statistics: Any) -> PagePlan:
        raise NotImplementedError


class BoundToy(BoundMethod):
    keeps_state = True
    settings: Toy

    def __init__(self, settings: Toy) -> None:
        self.settings = settings

    def remember(self, call: AttentionCall) -> None:
        assert call.kv_state is not None
        tensors = call.kv_state.of(TOYS)
        seen = tensors.get("seen", torch.zeros(len(call.q), 1, dtype=torch.int64))
        tensors["seen"] = seen + call.q.shape[2]

    def plan(self, call: AttentionCall) -> Plan:
        return LIST.get(call.forward_state) or PagePlan.every(call, wants_logits=True)

    def select(self, call: AttentionCall, logits: torch.Tensor, lse: torch.Tensor) -> None:
        lengths = call.lengths()
        position = torch.arange(logits.shape[-1])
        logits = logits.amax(1).masked_fill(position >= lengths[:, None], -torch.inf)
        tokens = logits.topk(min(self.settings.tokens, logits.shape[-1])).indices
        counts = lengths.clamp(max=tokens.shape[-1]).int()[:, None]
        LIST.put(call.forward_state, PagePlan.of(call, tokens.int()[:, None], counts, page_size=1))


TOY = PatchConfig(decode=Toy(), on_unsupported="error", source="toy")


def prompt(model: PreTrainedModel, batch: int = 2, pad: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (batch, PROMPT), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[-1, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def steps(model: PreTrainedModel, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Logits of eight generated tokens, `[8, B, vocabulary]`."""
    result = model.generate(
        **batch, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return torch.stack(result.logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_a_static_cache_gives_what_a_growing_one_gives(family: str) -> None:
    model = FAMILIES[family]()
    batch = prompt(model)
    dense = steps(model, batch)
    with patched(model, TOY):
        growing = steps(model, batch)
        report = sparsity_report(model)
        static = steps(model, batch, cache_implementation="static")
    assert not torch.allclose(growing, dense, atol=1e-4), "decode was sparse"
    torch.testing.assert_close(static, growing, atol=1e-4, rtol=1e-4)
    layers = [layer.decode for layer in report.layers if layer.decode.sparse_calls]
    assert [layer.sparse_calls for layer in layers] == [7] * len(layers) and len(layers) > 1
    assert layers[0].density == 1.0 and layers[1].attended == 24
    assert all(layer.copying_calls == 0 and not layer.fallbacks for layer in layers)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_compiled_step_of_a_static_cache(family: str) -> None:
    """The step is one graph without a break; lists and `KVState` are part of it."""
    torch._dynamo.reset()
    model = FAMILIES[family]()
    options = CompileConfig(backend="eager", fullgraph=True)
    options._compile_all_devices = True
    for pad in (0, 9):
        batch = prompt(model, pad=pad)
        with patched(model, TOY):
            eager = steps(model, batch, cache_implementation="static")
            before = sparsity_report(model)
            assert not any(layer.compiled for layer in before.layers)
            for _ in range(2):  # a graph that is run again counts again
                reset_report(model)
                compiled = steps(model, batch, cache_implementation="static", compile_config=options)
                after = sparsity_report(model)
                assert all(layer.compiled for layer in after.layers) and counted_in_graphs(after) == before.layers
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


def test_generate_makes_a_growing_cache_and_a_fixed_one() -> None:
    model = llama()
    batch = {**prompt(model), "max_new_tokens": 3, "return_dict_in_generate": True}
    with patched(model, TOY):
        growing = model.generate(**batch).past_key_values
        fixed = model.generate(**batch, cache_implementation="static").past_key_values
        own = DynamicCache(config=model.config)
        assert model.generate(**batch, past_key_values=own).past_key_values is own
    assert {type(layer) for layer in growing.layers} == {GrowingLayer}
    assert {type(layer) for layer in fixed.layers} == {FixedLayer}
    assert not any(isinstance(layer, GrowingLayer) for layer in own.layers)
    assert not any(isinstance(layer, GrowingLayer) for layer in model.generate(**batch).past_key_values.layers)


def test_a_dynamic_cache_of_the_users_own_works_and_the_report_names_its_cost() -> None:
    model = llama()
    batch = prompt(model)
    with patched(model, TOY):
        expected = steps(model, batch)
        assert not any("copies" in note for note in sparsity_report(model).notes())
        found = steps(model, batch, past_key_values=DynamicCache(config=model.config))
        notes = sparsity_report(model).notes()
    torch.testing.assert_close(found, expected)
    assert any(note.startswith("decode: 21 sparse calls on a DynamicCache, which copies") for note in notes), notes


@torch.no_grad()
def test_two_interleaved_generations_do_not_meet() -> None:
    """Each generation has the lists and the `KVState` of its own cache."""
    model = llama()
    ids = prompt(model, batch=2)["input_ids"]
    with patched(model, TOY):
        alone = []
        for row in ids:
            cache = growing_cache(model.config)
            logits = [model(row[None, :40], past_key_values=cache).logits[:, -1]]
            logits += [model(row[None, [i]], past_key_values=cache).logits[:, -1] for i in range(40, PROMPT)]
            alone.append(torch.cat(logits))
        caches = [growing_cache(model.config) for _ in ids]
        woven = [
            [model(row[None, :40], past_key_values=cache).logits[:, -1]] for row, cache in zip(ids, caches, strict=True)
        ]
        for i in range(40, PROMPT):
            for row, cache, logits in zip(ids, caches, woven, strict=True):
                logits.append(model(row[None, [i]], past_key_values=cache).logits[:, -1])
    for expected, logits, cache in zip(alone, woven, caches, strict=True):
        assert torch.equal(torch.cat(logits), expected)
        assert all(layer.kv_state.of(TOYS)["seen"].tolist() == [[PROMPT]] for layer in cache.layers)


@torch.no_grad()
def test_lists_live_for_one_forward() -> None:
    model = llama()
    ids = prompt(model, batch=1, pad=0)["input_ids"]
    with patched(model, TOY), capture_plans(model) as plans:
        cache = growing_cache(model.config)
        model(ids[:, :50], past_key_values=cache)
        for i in range(50, 53):
            model(ids[:, [i]], past_key_values=cache)
    lists = [plan for phase, plan in plans[1] if phase == "decode"]
    assert len({id(plan) for plan in lists}) == 3, "a new list for every token"
    assert all(plan is other for plan, (_, other) in zip(lists, plans[2][1:], strict=True)), "one for all layers"


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "cache_implementation": "static"}], ids=str)
def test_beams_carry_their_memory_along(options: dict[str, Any]) -> None:
    model = llama()
    batch = prompt(model, pad=0)
    with patched(model, TOY):
        result = model.generate(**batch, max_new_tokens=6, return_dict_in_generate=True, **options)
    rows = batch["input_ids"].shape[0] * options["num_beams"]
    for layer in result.past_key_values.layers:
        assert layer.kv_state.of(TOYS)["seen"].tolist() == [[PROMPT + 5]] * rows
    assert result.sequences.shape == (2, PROMPT + 6)


@torch.no_grad()
def test_what_the_method_cannot_see_makes_it_start_again() -> None:
    model = llama()
    ids = prompt(model, batch=1, pad=0)["input_ids"]
    with patched(model, TOY.model_copy(update={"on_unsupported": "silent"})):
        cache = growing_cache(model.config)
        model(ids[:, :50], past_key_values=cache)
        model(ids[:, 50:51], past_key_values=cache, output_attentions=True)
        assert all(layer.kv_state.tensors == {} for layer in cache.layers)
        model(ids[:, 51:52], past_key_values=cache)
    assert all(layer.kv_state.of(TOYS)["seen"].tolist() == [[1]] for layer in cache.layers)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_changing_the_rows_and_the_end_of_a_cache(static: bool) -> None:
    """Crop, reorder, repeat, select and reset give the keys and the `KVState` of a cache that was filled so."""
    model = llama()
    ids = prompt(model, pad=0)["input_ids"]

    def filled(rows: torch.Tensor) -> list[Any]:
        cache = StaticCache(config=model.config, max_cache_len=PROMPT) if static else DynamicCache(config=model.config)
        adopt(cache)
        model(rows, past_key_values=cache)
        for number, layer in enumerate(cache.layers):
            layer.kv_state.of(TOYS)["rows"] = rows[:, :1] + number
            layer.kv_state.covered = rows.shape[1]
        return cache.layers

    def check(layer: Any, rows: torch.Tensor, length: int) -> None:
        expected = filled(ids[:, :length])[0]
        assert int(layer.get_seq_length()) == length
        torch.testing.assert_close(layer.keys[:, :, :length], expected.keys[rows][:, :, :length])
        torch.testing.assert_close(layer.values[:, :, :length], expected.values[rows][:, :, :length])
        assert torch.equal(layer.kv_state.of(TOYS)["rows"], ids[rows, :1])

    layer = filled(ids[:, :40])[0]
    place = layer.keys.data_ptr()
    layer.crop(-7)
    check(layer, torch.tensor([0, 1]), 33)
    assert static or layer.kv_state.covered == 33
    layer.reorder_cache(torch.tensor([1, 0]))
    check(layer, torch.tensor([1, 0]), 33)
    assert not static or layer.keys.data_ptr() == place, "a graph finds it where it was"
    layer.batch_repeat_interleave(2)
    check(layer, torch.tensor([1, 1, 0, 0]), 33)
    layer.batch_select_indices(torch.tensor([0, 3]))
    check(layer, torch.tensor([1, 0]), 33)
    layer.reset()
    assert int(layer.get_seq_length()) == 0
    if static or RECENT:
        with pytest.raises(ValueError, match="negative"):
            layer.crop(3)


def test_a_deep_copy_and_unpatching_leave_nothing_behind() -> None:
    model = llama()
    before = set(vars(model))
    with patched(model, TOY):
        twin = copy.deepcopy(model)
    assert set(vars(model)) == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    batch = prompt(model)
    with patched(model, TOY):
        torch.testing.assert_close(steps(twin, batch), steps(model, batch))


# What holds for every decode method, through the hook.
METHODS = pytest.mark.parametrize("case", DECODE_METHODS, ids=lambda case: case.name)
FAST = pytest.mark.parametrize("case", [DECODE_METHODS[i] for i in (0, 3, 5, 8)], ids=lambda case: case.name)


def long_prompt(pad: int = 30) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (2, 200), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_every_decode_method_is_in_the_table() -> None:
    sparse = {name for name, method in registry().items() if "decode" in method.phases and name != "dense"}
    assert {case.small["method"] for case in (*DECODE_METHODS, *SPAN_METHODS, *TOKEN_METHODS)} == sparse


@METHODS
def test_a_full_budget_is_dense_bit_for_bit(case: MethodCase, five_layers: PreTrainedModel) -> None:
    batch = long_prompt()
    expected = steps(five_layers, batch)
    with patched(five_layers, {"decode": case.full}):
        assert torch.equal(steps(five_layers, batch), expected)


@METHODS
def test_backends_and_caches_agree(case: MethodCase, five_layers: PreTrainedModel) -> None:
    """The torch backend on a growing, a static and a user's own cache gives what the reference backend gives."""
    batch = long_prompt()
    with patched(five_layers, {"decode": case.small, "backend": "reference", "on_unsupported": "error"}):
        expected = steps(five_layers, batch)
        report = sparsity_report(five_layers)
    assert not torch.allclose(expected, steps(five_layers, batch), atol=1e-4), "decode was sparse"
    attended = [layer.decode.attended for layer in report.layers]
    assert min(attended) < 110 < max(attended), attended
    with patched(five_layers, {"decode": case.small, "on_unsupported": "error"}):
        for options in ({}, {"cache_implementation": "static"}, {"past_key_values": DynamicCache()}):
            found = steps(five_layers, batch, **options)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=str(options))


def test_a_backend_that_is_named_for_prefill_does_not_stop_decode(five_layers: PreTrainedModel) -> None:
    settings = {"decode": DECODE_METHODS[3].small, "on_unsupported": "error"}
    with patched(five_layers, settings):
        expected = steps(five_layers, long_prompt())
    with patched(five_layers, {**settings, "backend": "flash"}):
        assert torch.equal(steps(five_layers, long_prompt()), expected)


@METHODS
def test_a_padded_row_generates_what_it_generates_alone(case: MethodCase, five_layers: PreTrainedModel) -> None:
    batch = long_prompt(pad=30)
    alone = {"input_ids": batch["input_ids"][1:, 30:], "attention_mask": batch["attention_mask"][1:, 30:]}
    with patched(five_layers, {"decode": case.small}):
        together = steps(five_layers, batch)[:, 1]
        torch.testing.assert_close(together, steps(five_layers, alone)[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pad", [0, 9])
def test_a_step_without_masks_made_ahead(pad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on our kernels build no masks. A layer that falls back makes its own mask, also when compiled."""
    torch._dynamo.reset()
    options = CompileConfig(backend="eager", fullgraph=True)
    options._compile_all_devices = True
    model = FAMILIES["llama"]()
    batch = prompt(model, pad=pad)
    best = TOY.model_copy(update={"dense": "best"})
    with patched(model, best):
        expected = steps(model, batch, cache_implementation="static")
        before = sparsity_report(model)
    monkeypatch.setattr("sparse_patch.integration.patching.prefers_triton", lambda _: True)
    with patched(model, best):
        assert model.config._attn_implementation == hook_name("sdpa", ON_KERNELS) and sparsity_report(model).hook_active
        for more in ({}, {"compile_config": options}):
            reset_report(model)
            found = steps(model, batch, cache_implementation="static", **more)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert counted_in_graphs(sparsity_report(model)) == before.layers
        assert sparsity_report(model).layers[0].compiled
    assert model.config._attn_implementation == "sdpa"
    windowed = FAMILIES["gemma2"]()
    unpatched = windowed.config._attn_implementation
    with patched(windowed, best):
        assert windowed.config._attn_implementation == hook_name(unpatched, HOOK), "layers with a window need masks"
    torch._dynamo.reset()


@FAST
def test_a_compiled_step_of_every_kind_of_method(case: MethodCase, five_layers: PreTrainedModel) -> None:
    """It gives what the uncompiled step gives, and the same report."""
    torch._dynamo.reset()
    options = CompileConfig(backend="eager", fullgraph=True)
    options._compile_all_devices = True
    for pad in (0, 30):
        batch = long_prompt(pad=pad)
        with patched(five_layers, {"decode": case.small}):
            eager = steps(five_layers, batch, cache_implementation="static")
            before = sparsity_report(five_layers)
            reset_report(five_layers)
            compiled = steps(five_layers, batch, cache_implementation="static", compile_config=options)
            after = sparsity_report(five_layers)
        assert after.layers[2].compiled and counted_in_graphs(after) == before.layers
        torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


@FAST
@torch.no_grad()
def test_a_continued_chat_and_a_cut_cache(case: MethodCase, five_layers: PreTrainedModel) -> None:
    """Tokens, a second prompt and tokens again; tokens that are cut off and fed again give the same."""
    ids = long_prompt()["input_ids"]
    with patched(five_layers, {"decode": case.small}):
        cache = growing_cache(five_layers.config)
        pieces = [(0, 120), *((i, i + 1) for i in range(120, 126)), (126, 170), *((i, i + 1) for i in range(170, 176))]
        logits = [five_layers(ids[:, a:b], past_key_values=cache).logits[:, -1] for a, b in pieces]
        cache.crop(-20)  # into the second prompt
        five_layers(ids[:, 156:170], past_key_values=cache)
        again = [five_layers(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(170, 176)]
    torch.testing.assert_close(torch.stack(again), torch.stack(logits[-6:]), atol=1e-4, rtol=1e-4)


@FAST
def test_assisted_decoding_is_what_it_is_without_an_assistant(case: MethodCase, five_layers: PreTrainedModel) -> None:
    """Several tokens at a time are verified densely, so only a full budget must give the same text."""
    prompt = {"input_ids": long_prompt(0)["input_ids"][:1]}
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    with patched(five_layers, {"decode": case.full}):
        expected = five_layers.generate(**prompt, **settings)
        assert torch.equal(five_layers.generate(**prompt, **settings, assistant_model=llama()), expected)
    with patched(five_layers, {"decode": case.small}):
        five_layers.generate(**prompt, **settings, assistant_model=llama())
        assert "more than one query" in sparsity_report(five_layers).layers[-1].decode.dense


def test_no_key_is_copied_again_while_generating(five_layers: PreTrainedModel) -> None:
    """With the cache that `generate` makes, no concatenation in a profile is as large as the keys."""
    with patched(five_layers, {"decode": DECODE_METHODS[3].small}):
        five_layers.generate(**long_prompt(), max_new_tokens=2)
        with torch.profiler.profile(record_shapes=True) as profile:
            result = five_layers.generate(**long_prompt(), max_new_tokens=8, return_dict_in_generate=True)
    keys = result.past_key_values.layers[0].keys
    sizes = [event.input_shapes[0] for event in profile.events() if event.name == "aten::cat"]
    assert sizes and not [shapes for shapes in sizes if keys.shape[2] - 8 in torch.tensor(shapes).flatten().tolist()]
