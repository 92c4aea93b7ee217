"""SpargeAttn against the slow oracle, and SpargeAttn's own promises."""

import itertools
from typing import Any

import pytest
import torch
from bound import bound
from calls import lengths_to_test, make_call, row_alone
from oracles.spargeattn import Selection, SpargeAttnSettings, spargeattn_selection
from pydantic import ValidationError

from sparse_patch.call import AttentionCall
from sparse_patch.kernels import slices
from sparse_patch.methods.spargeattn import SpargeAttn
from sparse_patch.ops.attention.block_sparse import attend
from sparse_patch.plans import BlockGrid, BlockPlan, Dense

# Float32 sums and the oracle's float64 ones may fall on different sides of a threshold that is closer than this.
MARGIN = 1e-5
# Blocks of `make_call` have self-similarities on both sides of this, of keys more below it than of queries.
SOME_ALIKE = 0.55


def spargeattn(**settings: Any) -> SpargeAttn:
    return SpargeAttn.model_validate({"block_size": 16, "min_length": 0, **settings})


def by_mass(threshold: float = 0.9, similarity: float = SOME_ALIKE, **settings: Any) -> SpargeAttn:
    return spargeattn(selection="cdf", cdf_threshold=threshold, similarity_threshold=similarity, **settings)


def blocks_of(method: SpargeAttn, call: AttentionCall) -> torch.Tensor:
    plan = bound(method).plan(call)
    assert isinstance(plan, BlockPlan)
    return plan.blocks()


def changed(call: AttentionCall, **fields: Any) -> AttentionCall:
    return AttentionCall(**{**vars(call), **fields})


def oracle(method: SpargeAttn, call: AttentionCall) -> Selection:
    topk = method.topk if method.selection == "topk" else None
    settings = SpargeAttnSettings(
        topk, method.cdf_threshold, method.least_similarity, method.attention_sink, method.block_size
    )
    return spargeattn_selection(
        call.q[0].double().numpy(), call.k[0].double().numpy(), call.scale, settings, call.softcap
    )


def compare_with_oracle(method: SpargeAttn, call: AttentionCall) -> tuple[int, int]:
    """Assert equality unless a decision is within rounding of its threshold: `(rows compared, rows in doubt)`."""
    expected, plan = oracle(method, call), bound(method).plan(call)
    blocks = plan.blocks()[0] if isinstance(plan, BlockPlan) else BlockGrid.of(call, method.block_size).causal
    clear = torch.from_numpy(expected.margins > MARGIN)
    wrong = (blocks != torch.from_numpy(expected.blocks)).any(-1) & clear
    assert not wrong.any(), f"head, query block: {wrong.nonzero().tolist()[:5]}"
    return int(clear.sum()), int((~clear).sum())


def test_the_plan_equals_the_oracle_at_every_length() -> None:
    compared = in_doubt = 0
    for number, length in enumerate(lengths_to_test(16)):
        heads = [(1, 1), (4, 1), (3, 3), (4, 2)][number % 4]
        similarity = [-0.1, 0.45, SOME_ALIKE, 0.65][number // 2 % 4]
        method = by_mass([0.3, 0.7, 0.95][number % 3], similarity)
        if number % 2:
            share = [0.1, 0.3, 0.6][number % 3]
            method = spargeattn(topk=share, similarity_threshold=similarity, attention_sink=number % 4 == 1)
        call = make_call(length, heads=heads, seed=number, softcap=[None, 5.0][number % 2])
        done, doubtful = compare_with_oracle(method, call)
        compared, in_doubt = compared + done, in_doubt + doubtful
    assert compared > 300 and in_doubt < 0.02 * compared


@pytest.mark.parametrize("settings", [{"selection": "cdf", "cdf_threshold": 0.7}, {"topk": 0.4}], ids=str)
@pytest.mark.parametrize("block_size", [16, 64])
def test_chunks_equal_the_oracle(block_size: int, settings: dict[str, Any]) -> None:
    """Chunks begin on the edge of a block and inside a block."""
    method = spargeattn(**settings, similarity_threshold=SOME_ALIKE, block_size=block_size)
    compared = 0
    for number, (length, queries) in enumerate([(256, 64), (203, 77), (201, 9)]):
        compared += compare_with_oracle(method, make_call(length, queries=queries, heads=(4, 2), seed=number))[0]
    assert compared > 12


def test_blocks_that_are_not_alike_are_read_and_computed_whole() -> None:
    call = make_call(500, heads=(4, 2))
    method = by_mass(0.5)
    found, blocks = oracle(method, call), blocks_of(method, call)[0]
    causal = BlockGrid.of(call, 16).causal[0]
    for alike in (found.alike_q, found.alike_k):
        assert 0 < alike.mean() < 1, "the test needs blocks of both kinds"
    other_q, other_k = ~torch.from_numpy(found.alike_q), ~torch.from_numpy(found.alike_k)
    assert (blocks >= (other_q[..., None] & causal)).all()
    assert (blocks >= (other_k[:, None] & causal)).all()
    assert (blocks <= causal).all() and (blocks < causal).any()


def test_a_threshold_below_0_asks_for_no_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(400)
    expected = blocks_of(spargeattn(topk=0.3, similarity_threshold=0.0), call)
    monkeypatch.setattr("sparse_patch.methods.spargeattn.key_similarities", None)
    assert torch.equal(blocks_of(spargeattn(topk=0.3), call), expected)


def test_every_row_keeps_its_diagonal_and_block_0_where_it_is_a_sink() -> None:
    call = make_call(500, queries=300)
    diagonal = BlockGrid.of(call, 16).query_block_ids[:, None, :, None]
    for sink in (False, True):
        blocks = blocks_of(by_mass(0.0, similarity=-1.0, attention_sink=sink), call)
        assert blocks.gather(-1, diagonal.expand(*blocks.shape[:-1], 1)).all()
        assert blocks[..., 0].all() == sink and blocks.sum(-1).max() <= 2 + sink


def test_topk_counts_against_all_blocks_of_the_row() -> None:
    """One half of 32 blocks: rows up to the sixteenth block read everything, later ones 16 and perhaps the diagonal."""
    number = blocks_of(spargeattn(topk=0.5), make_call(512)).sum(-1)
    assert torch.equal(number[0, :, :16], torch.arange(1, 17).expand(4, 16))
    assert set(number[0, :, 16:].unique().tolist()) <= {16, 17}


@pytest.mark.parametrize("settings", [{"selection": "topk"}, {"selection": "cdf"}], ids=str)
def test_plans_are_nested_in_the_budget(settings: dict[str, str]) -> None:
    call = make_call(1200, sharpness=0.4)
    field = "topk" if settings["selection"] == "topk" else "cdf_threshold"
    previous = torch.zeros(1, dtype=torch.bool)
    for budget in (0.05, 0.3, 0.6, 0.9):
        blocks = blocks_of(spargeattn(**settings, **{field: budget}, similarity_threshold=SOME_ALIKE), call)
        assert (blocks | ~previous).all() and (blocks != previous).any()
        previous = blocks


def test_the_order_of_keys_within_a_block_changes_nothing() -> None:
    call = make_call(480)
    order = torch.cat([torch.randperm(16) + 16 * block for block in range(30)])
    assert torch.equal(blocks_of(by_mass(), changed(call, k=call.k[:, :, order])), blocks_of(by_mass(), call))


def test_a_vector_added_to_every_key_changes_nothing() -> None:
    """This is the purpose of smoothing: without it all blocks would be alike."""
    call = make_call(400)
    moved = changed(call, k=call.k + 10 * torch.randn(16))
    assert torch.equal(blocks_of(by_mass(), moved), blocks_of(by_mass(), call))
    assert oracle(by_mass(), moved).alike_k.mean() < 1


@pytest.mark.parametrize("begin", [208, 240])
def test_nothing_behind_a_token_reaches_it_but_by_the_mean_key(begin: int) -> None:
    call = make_call(400)
    order = torch.cat([torch.arange(begin), torch.randperm(400 - begin) + begin])  # the mean key stays
    other = changed(call, k=call.k[:, :, order], v=call.v * (torch.arange(400) < begin)[:, None])
    method = by_mass(0.6)
    outputs = [attend(each, bound(method).plan(each))[0] for each in (call, other)]  # type: ignore[arg-type]
    torch.testing.assert_close(outputs[0][:, :, :begin], outputs[1][:, :, :begin], atol=2e-6, rtol=1e-5)
    plain = by_mass(0.6, similarity=-1.0)
    other = changed(other, k=other.k + 9.0 * (torch.arange(400) >= begin)[:, None])
    expected = blocks_of(plain, call)[:, :, : begin // 16]
    assert torch.equal(blocks_of(plain, other)[:, :, : begin // 16], expected)


@pytest.mark.parametrize("begin", [64, 240, 384])
def test_a_chunk_from_a_block_edge_selects_what_the_whole_prompt_does(begin: int) -> None:
    call = make_call(500, heads=(4, 2))
    chunk = changed(call, q=call.q[:, :, begin:], q_start=begin)
    for method in (by_mass(0.7), spargeattn(topk=0.2, similarity_threshold=SOME_ALIKE)):
        assert torch.equal(blocks_of(method, chunk), blocks_of(method, call)[:, :, begin // 16 :])


def test_a_padded_row_of_any_length_selects_what_it_does_alone() -> None:
    batch = make_call(400, queries=350, row_starts=[0, 7, 64, 130, 399], heads=(4, 2))
    for method in (by_mass(0.7, attention_sink=True), spargeattn(topk=0.3, similarity_threshold=SOME_ALIKE)):
        blocks = blocks_of(method, batch)
        for row in range(4):
            expected = blocks_of(method, row_alone(batch, row)[0])[0]
            assert torch.equal(blocks[row, :, : expected.shape[1], : expected.shape[2]], expected)
        assert blocks[4].sum() == 4  # one token


@pytest.mark.parametrize("budget", [1, 40_000])
def test_the_size_of_the_slices_changes_nothing(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [make_call(200, queries=150, row_starts=[0, 37]), make_call(200)]
    methods = [by_mass(), spargeattn(topk=0.2)]
    expected = [blocks_of(method, call) for method in methods for call in calls]
    monkeypatch.setattr(slices, "SLICE_BYTES", budget)
    for blocks, (method, call) in zip(expected, itertools.product(methods, calls), strict=True):
        assert torch.equal(blocks_of(method, call), blocks)


def test_softcap_and_scale_reach_the_selection() -> None:
    call = make_call(500, sharpness=3.0)
    base = blocks_of(by_mass(), call)
    for change in ({"softcap": 0.5}, {"scale": 0.01}):
        assert (blocks_of(by_mass(), changed(call, **change)) != base).any()


@pytest.mark.parametrize("threshold", [0.5, 3.0, 10.0])
def test_what_the_second_filter_leaves_out_is_bounded(threshold: float) -> None:
    call = make_call(400, sharpness=4.0)
    selected = bound(by_mass()).plan(call)
    filtered = bound(by_mass(pv_threshold=threshold)).plan(call)
    assert isinstance(selected, BlockPlan) and isinstance(filtered, BlockPlan)
    assert torch.equal(selected.blocks(), filtered.blocks())
    (whole, before, _), (output, after, _) = (attend(call, plan, return_lse=True) for plan in (selected, filtered))
    assert before is not None and after is not None
    left_out = 1 - torch.exp(after - before)
    assert left_out.max() <= 400 * 2**-threshold + 1e-4 and (left_out.max() > 1e-3) == (threshold < 10)
    error = (output - whole).abs().amax(-1)
    assert (error <= 2 * left_out.clamp(min=0) * call.v.abs().max() + 1e-3).all()


def test_the_published_thresholds_go_with_the_selection() -> None:
    assert spargeattn().least_similarity == -0.1
    assert spargeattn(selection="cdf").least_similarity == 0.6
    assert spargeattn(selection="cdf", similarity_threshold=0.2).least_similarity == 0.2


def test_settings_and_calls_that_leave_nothing_out_are_dense() -> None:
    for settings in ({"topk": 1.0}, {"selection": "cdf", "cdf_threshold": 1.0}, {"similarity_threshold": 1.0}):
        assert isinstance(bound(spargeattn(**settings)).plan(make_call(400)), Dense)
    for length, sink, dense in ((16, False, True), (17, False, False), (32, True, True), (33, True, False)):
        plan = bound(spargeattn(topk=0.1, attention_sink=sink)).plan(make_call(length))
        assert isinstance(plan, Dense) == dense


BAD = {"topk": 0.0, "cdf_threshold": -0.1, "similarity_threshold": 1.5, "pv_threshold": -1.0, "block_size": 48}


@pytest.mark.parametrize("field", BAD)
def test_bad_settings_are_refused(field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        SpargeAttn.model_validate({field: BAD[field]})
