"""InfLLM-V2 against its oracle, its limits, chunks and decode, and the settings of checkpoints."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from bound import bound
from calls import in_buffer, make_call
from decode_steps import decode_call, forward, forward_of_row
from families import llama
from method_table import SMALL_MODEL, TOKEN_METHODS
from oracles.infllmv2 import InfLLMSettings, infllm_selection
from transformers import DynamicCache, PreTrainedModel
from transformers.generation import CompileConfig

from sparse_patch import ConfigError, growing_cache, load_config, patched, sparsity_report
from sparse_patch.call import AttentionCall
from sparse_patch.methods.infllmv2 import BoundInfLLM, InfLLMv2
from sparse_patch.ops.attention.token_blocks import attend
from sparse_patch.plans import Dense, PagePlan, TokenBlockPlan

SMALL = TOKEN_METHODS[0].small
FULL = TOKEN_METHODS[0].full
CLEAR = 1 + 1e-4  # a choice whose scores are this far apart does not depend on rounding


def build(**changes: Any) -> InfLLMv2:
    return InfLLMv2.model_validate({**SMALL, **changes})


def plan_of(call: AttentionCall, **changes: Any) -> TokenBlockPlan:
    plan = bound(build(**changes)).plan(call)
    assert isinstance(plan, TokenBlockPlan)
    return plan


def by_query(plan: TokenBlockPlan, row: int = 0) -> torch.Tensor:
    """The blocks of each query of the call, bool `[Hkv, Sq, N]`."""
    grid = plan.grid
    first = grid.q_start - int(grid.query_block_ids[row, 0]) * grid.block_size - int(grid.row_starts[row])
    return plan.blocks()[row].flatten(1, 2)[:, first : first + grid.q_length]


@pytest.mark.parametrize("queries", [700, 200], ids=["whole", "chunk"])
@pytest.mark.parametrize("heads", [(4, 2), (7, 1), (16, 1)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {"topk": 4, "window_size": 64},
        {"topk": 5, "window_size": 128, "init_blocks": 2, "min_length": 300},
        {"topk": 3, "window_size": 192, "init_blocks": 0},
    ],
    ids=str,
)
def test_the_choice_is_the_oracles(settings: dict[str, int], heads: tuple[int, int], queries: int) -> None:
    softcap = 20.0 if heads == (7, 1) else None
    call = make_call(700, queries=queries, heads=heads, softcap=softcap)
    plan = plan_of(call, **settings)
    full = InfLLMSettings(**{"init_blocks": 1, "min_length": 0, **settings})
    expected = infllm_selection(call.q[0].double().numpy(), call.k[0].double().numpy(), call.scale, full, softcap)
    same = (by_query(plan) == torch.from_numpy(expected.blocks)).all(-1)
    margins = torch.from_numpy(expected.margins)
    clear = (margins > CLEAR) | (margins == 1)  # neighbours share a column, and with it the score: the lower one wins
    assert clear.float().mean() > 0.95
    assert same[clear].all()
    assert torch.equal(plan.computed_pairs(), plan.mask().sum((-1, -2)))


def test_what_is_read_in_any_case() -> None:
    """Scaled-down published settings: the first block, the token's own, those before it, and the rest of `topk`."""
    plan = plan_of(make_call(1000, heads=(4, 2)), topk=4, window_size=128)
    blocks = by_query(plan)
    for i in (0, 63, 64, 65, 127, 128, 500, 640, 703, 704, 999):
        own = i // 64
        assert blocks[:, i, 0].all() and blocks[:, i, max(own - 2, 0) : own + 1].all()
        assert not blocks[:, i, own + 1 :].any()
        assert (blocks[:, i].sum(-1) == min(own + 1, 4 + 2)).all()


def test_no_later_token_has_a_part() -> None:
    call = make_call(600)
    plan, (output, *_) = plan_of(call), attend(call, plan_of(call))
    for end in (300, 447, 448, 463):
        k, v, q = call.k.clone(), call.v.clone(), call.q.clone()
        k[:, :, end:], v[:, :, end:], q[:, :, end:] = 40.0, torch.nan, -40.0
        changed = replace(call, q=q, k=k, v=v)
        later = plan_of(changed)
        assert torch.equal(by_query(later)[:, :end], by_query(plan)[:, :end])
        v[:, :, end:] = 1000.0
        torch.testing.assert_close(attend(changed, later)[0][:, :, :end], output[:, :, :end])


def test_as_many_blocks_as_there_are_is_dense() -> None:
    call = make_call(640)
    assert isinstance(bound(build(topk=9)).plan(call), Dense)
    plan = plan_of(call, topk=8)
    assert plan.density().max() < 1
    everything = plan_of(make_call(641), topk=9, window_size=64)
    assert everything.mask().sum() == 4 * (641 * 642 // 2 - 1 * 64), "the last token leaves one block out"


def test_the_first_tokens_read_everything() -> None:
    plan = plan_of(make_call(640), min_length=400)
    causal = torch.ones(640, 640, dtype=torch.bool).tril()
    assert torch.equal(plan.mask()[0, 0, :448], causal[:448])
    assert not torch.equal(plan.mask()[0, 0, 448:], causal[448:])


@pytest.mark.parametrize("cuts", [(320, 448), (301, 333, 500), (1, 599)], ids=str)
@pytest.mark.parametrize("row_starts", [None, [0, 70]], ids=["plain", "padded"])
def test_a_prompt_in_chunks_is_the_prompt_at_once(cuts: tuple[int, ...], row_starts: list[int] | None) -> None:
    call = make_call(600, row_starts=row_starts)
    whole = plan_of(call, min_length=200).mask()
    for begin, end in zip((0, *cuts), (*cuts, 600), strict=True):
        q, k, v = call.q[:, :, begin:end], call.k[:, :, :end], call.v[:, :, :end]
        chunk = replace(call, q=q, k=k, v=v, q_start=begin)
        plan, expected = bound(build(min_length=200)).plan(chunk), whole[:, :, begin:end]
        if isinstance(plan, Dense):
            own = torch.arange(begin, end)[:, None] >= torch.arange(end)
            real = torch.arange(end) >= chunk.row_starts()[:, None]
            assert torch.equal(expected[..., :end], (own & real[:, None])[:, None].expand_as(expected[..., :end]))
        else:
            assert isinstance(plan, TokenBlockPlan)
            assert torch.equal(plan.mask(), expected[..., :end])


def test_a_decoded_token_reads_what_it_would_in_the_prompt() -> None:
    for length in (500, 511, 512, 513, 576):
        call = decode_call(length, row_starts=[0, 41], heads=(8, 2))
        step = forward(build(), [call])[0]
        prompt = make_call(length, row_starts=[0, 41], heads=(8, 2), queries=length)
        assert torch.equal(prompt.q[:, :, -1:], call.q)
        assert torch.equal(step.mask, plan_of(prompt).mask()[:, :, -1:])
        assert isinstance(step.plan, PagePlan) and (step.plan.counts == 4).all()


def test_decode_lists_and_their_limits() -> None:
    assert isinstance(bound(build(topk=9)).plan(decode_call(640)), Dense)
    assert "more than one query" in str(bound(build()).plan(decode_call(640, queries=3)))
    assert "min_length" in str(bound(build(min_length=600)).plan(decode_call(640)))
    assert isinstance(bound(build(min_length=600)).plan(decode_call(641)), PagePlan)
    for length in (1, 20, 64, 130, 256):  # the device alone knows that the budget covers everything
        step = forward(build(), [in_buffer(decode_call(length), 400)])[0]
        assert isinstance(step.plan, PagePlan) and torch.equal(step.mask, PagePlan.every(step.call).mask())


def test_a_static_buffer_and_a_padded_row_change_nothing() -> None:
    batch = decode_call(500, row_starts=[0, 7, 64, 230, 490], value_dim=24)
    step = forward(build(), [batch])[0]
    static = forward(build(), [in_buffer(batch, 77)])[0]
    assert torch.equal(step.mask, static.mask[..., :500]) and not static.mask[..., 500:].any()
    assert torch.equal(step.output, static.output)
    for row, start in enumerate([0, 7, 64, 230, 490]):
        alone = forward_of_row(build(), [batch], row)[0]
        assert torch.equal(step.mask[row, :, :, start:], alone.mask[0])
        assert not step.mask[row, :, :, :start].any()


def test_huge_scores_do_not_push_out_what_is_always_read() -> None:
    call = decode_call(640, sharpness=500.0)
    step = forward(build(), [call])[0]
    assert step.mask[0, :, 0, :64].all() and step.mask[0, :, 0, 512:].all()


# --- through the hook ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return llama()


def prompt(pad: int = 30, length: int = 470) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


def steps(model: PreTrainedModel, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    result = model.generate(
        **batch, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return torch.stack(result.logits)


def test_below_the_switch_it_is_dense_bit_for_bit(model: PreTrainedModel) -> None:
    batch = prompt(length=200)
    expected = steps(model, batch)
    for settings in ({**SMALL, "min_length": 210}, FULL):
        with patched(model, {"both": settings, "on_unsupported": "error"}):
            assert torch.equal(steps(model, batch), expected)


def test_backends_and_caches_agree(model: PreTrainedModel) -> None:
    batch = prompt()
    settings = {"both": SMALL, "on_unsupported": "error"}
    with patched(model, {**settings, "backend": "reference"}):
        expected = steps(model, batch)
        report = sparsity_report(model).layers[0]
    assert report.prefill.sparse_calls == 1 and report.decode.sparse_calls == 5
    assert report.decode.attended < 260 and report.prefill.density < 0.95
    assert not torch.allclose(expected, steps(model, batch), atol=1e-4)
    options = CompileConfig(backend="eager", fullgraph=True)
    options._compile_all_devices = True
    with patched(model, settings):
        for more in (
            {},
            {"past_key_values": DynamicCache()},
            {"cache_implementation": "static"},
            {"cache_implementation": "static", "compile_config": options},
        ):
            torch.testing.assert_close(steps(model, batch, **more), expected, atol=1e-4, rtol=1e-4, msg=str(more))
        alone = {"input_ids": batch["input_ids"][1:, 30:], "attention_mask": batch["attention_mask"][1:, 30:]}
        torch.testing.assert_close(steps(model, alone)[:, 0], expected[:, 1], atol=1e-4, rtol=1e-4)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_cache_that_crosses_the_switch_and_is_cut(model: PreTrainedModel) -> None:
    """Chunks and tokens cross `min_length` from below; tokens that are cut off and fed again give the same."""
    ids = prompt()["input_ids"]
    with patched(model, {"both": {**SMALL, "min_length": 300}}):
        cache = growing_cache(model.config)
        pieces = [(0, 200), (200, 297), *((i, i + 1) for i in range(297, 303)), (303, 440), (440, 441), (441, 442)]
        logits = [model(ids[:, a:b], past_key_values=cache).logits[:, -1] for a, b in pieces]
        fresh = copy.deepcopy(cache)
        cache.crop(-100)
        again = model(ids[:, 342:442], past_key_values=cache).logits[:, -1]
        at_once = model(ids[:, :442]).logits[:, -1]
    torch.testing.assert_close(again, at_once, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[-1], at_once, atol=1e-4, rtol=1e-4)
    assert fresh.layers[0].kv_state.covered == 442


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_checkpoint_sets_what_the_configuration_leaves_open() -> None:
    theirs = {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 2, "block_size": 64, "window_size": 1024}
    shape = replace(SMALL_MODEL, sparse_config={**theirs, "topk": 32, "use_nope": False, "dense_len": -1})
    config = load_config("infllmv2", both={"topk": 20}).bind(shape)
    assert config.settings.prefill == config.settings.decode
    assert config.settings.settings()["prefill"] | {"layers": "all"} == {
        "method": "infllmv2",
        "layers": "all",
        "min_length": 0,
        "topk": 20,
        "init_blocks": 2,
        "window_size": 1024,
    }
    published = InfLLMv2().bind(SMALL_MODEL)
    assert isinstance(published, BoundInfLLM)
    assert published.settings == InfLLMv2(topk=64, init_blocks=1, window_size=2048, min_length=8192)
    assert published.most_blocks == 96 and published.params.chosen == 62


@pytest.mark.parametrize(
    "settings, theirs, message",
    [
        ({"window_size": 100}, {}, r"both.window_size|prefill.window_size: expected .*multiple of 64"),
        ({"topk": 2}, {}, "prefill.topk: 2 leaves no block to choose"),
        ({}, {"init_blocks": 63}, "prefill.topk: 64 leaves no block to choose beside the 63 first ones"),
        ({}, {"topk": "64"}, "prefill.topk: expected a whole number, .* sparse_config has topk '64'; set topk"),
        ({}, {"window_size": 100}, "prefill.window_size: expected a multiple of 64, .* has window_size 100"),
        ({}, {"dense_len": None}, "prefill.min_length: expected a whole number, .* has dense_len None"),
        ({}, {"block_size": 128}, "prefill.method: the checkpoint's sparse_config has block_size 128"),
        ({}, {"use_nope": True}, "prefill.method: the checkpoint's sparse_config has use_nope True"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings: dict[str, Any], theirs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("infllmv2", both=settings).bind(replace(SMALL_MODEL, sparse_config=theirs))
