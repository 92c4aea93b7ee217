"""The decisions of 64 queries by 32 keys: every backend against the oracle, and what holds for all of them."""

import itertools
import math

import numpy as np
import pytest
import torch
from calls import make_call, row_alone
from oracles.sale import SaleSettings, Selection, regions, sale_selection

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.kernels import slices
from sparse_patch.ops.layout import query_slots
from sparse_patch.ops.selection.low_bit_scores import (
    LowBitParams,
    Numerics,
    decided_pairs,
    decisions,
    tiles,
    unpacked,
    why_unsupported,
)
from sparse_patch.ops.selection.low_bit_scores import torch as in_torch
from sparse_patch.ops.selection.low_bit_scores import triton as in_triton
from sparse_patch.ops.selection.low_bit_scores.maps import packed
from sparse_patch.ops.selection.low_bit_scores.params import TileBounds, mean_key, mean_query
from sparse_patch.plans import BlockGrid, BlockPlan

# Float32 sums and the oracle's float64 sums may lie on different sides of a limit that is closer than this, in logits;
# in half precision the estimate itself is rounded.
MARGIN = {torch.float32: 1e-4, torch.float16: 2e-2}
NUMERICS = pytest.mark.parametrize("numerics", ["int8", "int4"])
TAU = [0.004, 0.1, 1.0, 0.0]


def decide(
    call: AttentionCall, rule: LowBitParams, backend: str = "torch", tau: list[float] | None = None
) -> torch.Tensor:
    """Decisions as bits, bool `[B, Hq, NQ, blocks]`."""
    heads = call.q.shape[1]
    words = decisions(call, torch.tensor(tau or (TAU * heads)[:heads]), rule, backend)
    assert words.dtype == torch.int32 and words.shape[-1] == math.ceil(call.kv_length / 1024)
    bits, blocks = unpacked(words), math.ceil(call.kv_length / 32)
    assert not bits[..., blocks:].any(), "a bit behind the last key"
    return bits[..., :blocks]


def oracle(call: AttentionCall, rule: LowBitParams, tau: list[float], numerics: str | None = None) -> Selection:
    settings = SaleSettings(numerics or rule.numerics, rule.local_window)
    return sale_selection(call.q[0].numpy(), call.k[0].numpy(), call.scale, tau, settings, call.softcap)


def compare_with_oracle(call: AttentionCall, rule: LowBitParams) -> tuple[int, int]:
    """Assert equality for decisions beyond rounding of their limit: (candidates compared, candidates in doubt)."""
    expected = oracle(call, rule, TAU[: call.q.shape[1]])
    margins = torch.from_numpy(expected.margins)
    clear = margins > MARGIN[call.q.dtype]
    for backend in ("reference", "torch", "triton"):
        wrong = (decide(call, rule, backend)[0] != torch.from_numpy(expected.kept)) & clear
        assert not wrong.any(), f"{backend}: head, tile, block: {wrong.nonzero().tolist()[:5]}"
    return int((clear & margins.isfinite()).sum()), int((~clear).sum())


@NUMERICS
@pytest.mark.parametrize("window, cases", [
    (32, [(288, 288, torch.float32, None), (321, 150, torch.float32, 20.0)]),
    (64, [(319, 319, torch.float16, None), (300, 171, torch.float32, 20.0)]),
])  # fmt: skip
def test_decisions_equal_the_oracle(
    numerics: Numerics, window: int, cases: list[tuple[int, int, torch.dtype, float | None]]
) -> None:
    """Tails of every kind, chunks that begin inside a tile, softcap, half precision; every backend."""
    compared = in_doubt = 0
    for seed, (length, queries, dtype, softcap) in enumerate(cases):
        call = make_call(length, queries=queries, heads=(3, 1), head_dim=32, seed=seed, dtype=dtype, softcap=softcap)
        call.k[:, :, 20:31] = 2 * call.q.mean((1, 2))[:, None, None]  # a sink that counts
        done, doubtful = compare_with_oracle(call, LowBitParams(numerics, window))
        compared, in_doubt = compared + done, in_doubt + doubtful
    assert compared > 30 and in_doubt < 0.02 * compared


@NUMERICS
def test_codes_and_scales_equal_the_oracle(numerics: Numerics) -> None:
    """They agree bit for bit, except for codes of values that lie where the code changes."""
    call, rule = make_call(300, queries=237, heads=(4, 2), head_dim=40, dtype=torch.float16), LowBitParams(numerics)
    expected = oracle(call, rule, [1.0] * 4)
    mean_k, mean_q = mean_key(call), mean_query(call) if numerics == "int4" else None
    keys = in_torch.quantised_keys(call, rule, mean_k, mean_q)
    largest = 7 if numerics == "int4" else 127
    codes, scales, mean_term = in_triton.quantise_keys(call.k, mean_k, mean_q, None, largest)
    assert torch.equal(codes[..., :40], keys.codes) and codes[..., 40:].eq(0).all() and codes[:, :, 300:].eq(0).all()
    assert torch.equal(scales, keys.scales)
    if keys.mean_term is not None:
        torch.testing.assert_close(mean_term, keys.mean_term, atol=0, rtol=2e-3)  # a unit in the last place
    key = torch.arange(300)
    for head, theirs in enumerate(expected.keys):
        lane = key % 8 // 2 if numerics == "int4" else 0
        assert torch.equal(keys.scales[0, head, key // 32, lane], torch.from_numpy(theirs.scales))
        assert_same_codes(keys.codes[0, head, :300], theirs.codes, theirs.ties)
    bounds = TileBounds.of(call, rule)
    real = bounds.grid.query_is_real.flatten(1)
    q = query_slots(call.q, bounds.grid, 0, real.shape[1])
    codes_q, scales_q = in_torch.quantised_queries(q, real, rule, mean_q)
    for head, theirs in enumerate(expected.queries):
        assert torch.equal(scales_q[0, head, real[0]], torch.from_numpy(theirs.scales))
        assert_same_codes(codes_q[0, head, real[0]], theirs.codes, theirs.ties)


def assert_same_codes(codes: torch.Tensor, expected: np.ndarray, ties: np.ndarray) -> None:
    differ = codes.numpy() != expected
    assert not (differ & (ties > 1e-3)).any() and differ.mean() < 1e-3
    assert np.abs(codes.numpy() - expected).max() <= 1


def test_the_published_segments() -> None:
    """The rule's formula is the specification's; with 128 tokens, 5 and 7 blocks alternate."""
    for window, length in itertools.product((32, 128, 256), (1, 31, 64, 65, 300, 1000)):
        bounds = TileBounds.of(make_call(length, head_dim=16, heads=(1, 1)), LowBitParams("int8", window))
        expected = [regions(length, m, window) for m in range(math.ceil(length / 64))]
        assert list(zip(bounds.visible[0].tolist(), bounds.local[0].tolist(), strict=True)) == expected
    assert [visible - local for visible, local in (regions(1024, m, 128) for m in range(4, 16))] == [5, 7] * 6


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_limits_are_of_the_reference_region_alone(softcap: float | None) -> None:
    call, rule = make_call(450, queries=300, head_dim=32, softcap=softcap, sharpness=0.5), LowBitParams("int8", 32)
    bounds, tau = TileBounds.of(call, rule), [0.004, 0.1, 0.5, 0.02]
    real = bounds.grid.query_is_real.flatten(1)
    every = slice(0, bounds.grid.num_query_blocks)
    q = query_slots(call.q, bounds.grid, 0, real.shape[1])
    limits = in_torch.limits(call, torch.tensor(tau), bounds, mean_key(call), q, real, every)
    assert limits[0, :, ~real[0]].isinf().all()
    expected = torch.from_numpy(oracle(call, rule, tau).limits).float()
    torch.testing.assert_close(limits[0, :, real[0]], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("length, queries", [(1, 1), (31, 31), (33, 2), (64, 64), (65, 1), (257, 193), (1025, 1)])
def test_small_and_odd_calls(length: int, queries: int) -> None:
    call, rule = make_call(length, queries=queries, heads=(1, 1)), LowBitParams("int8", 32)
    bits = decide(call, rule, "reference")
    assert torch.equal(decide(call, rule, "torch"), bits) and torch.equal(decide(call, rule, "triton"), bits)
    assert bits[0, 0, -1, -1] and bits[0, 0, :, 0].all()


@pytest.mark.parametrize(
    "queries, softcap, numerics",
    [(300, None, "int8"), (171, 20.0, "int8"), (171, 20.0, "int4"), (150, None, "int4"), (1, None, "int8")],
)
def test_padding_chunks_and_softcap(queries: int, softcap: float | None, numerics: Numerics) -> None:
    """Triton equals PyTorch, and a row of a batch equals the row alone."""
    call = make_call(300, queries=queries, row_starts=[0, 137], softcap=softcap, head_dim=32, heads=(2, 1))
    rule = LowBitParams(numerics, 32)
    bits = decide(call, rule)
    assert torch.equal(decide(call, rule, "triton"), bits)
    for row in range(2):
        alone = decide(row_alone(call, row)[0], rule)[0]
        assert torch.equal(bits[row, :, : alone.shape[1], : alone.shape[2]], alone)
        assert not bits[row, :, alone.shape[1] :].any() and not bits[row, ..., alone.shape[2] :].any()


@NUMERICS
@pytest.mark.parametrize("dtype, head_dim, heads", [
    (torch.float16, 80, (3, 1)), (torch.float16, 160, (1, 1)), (torch.float32, 64, (2, 2)),
])  # fmt: skip
def test_groups_head_dims_and_dtypes(
    numerics: Numerics, dtype: torch.dtype, head_dim: int, heads: tuple[int, int]
) -> None:
    call, rule = make_call(260, heads=heads, head_dim=head_dim, dtype=dtype), LowBitParams(numerics, 32)
    bits = decide(call, rule)
    assert (bits != decide(call, rule, "triton")).float().mean() < 2e-3  # sums in another order, rounded to half
    repeated = AttentionCall(**{**vars(call), "k": call.k.repeat_interleave(call.group_size, 1)})
    assert torch.equal(decide(repeated, rule), bits)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_more_than_one_word(backend: str) -> None:
    """Candidates in two words and none in a third; every word is written."""
    call, rule = (
        make_call(2100, queries=200, heads=(1, 1), head_dim=16, sharpness=0.5),
        LowBitParams("int8", 900 // 32 * 32),
    )
    bits = decide(call, rule, backend, tau=[0.01])
    expected = oracle(call, rule, [0.01])
    clear = torch.from_numpy(expected.margins > 1e-4)
    assert torch.equal(bits[0] & clear, torch.from_numpy(expected.kept) & clear)
    assert 0 < bits[..., 1:30].float().mean() < 1


@NUMERICS
def test_forced_blocks_and_causality(numerics: Numerics) -> None:
    """At the highest tau only the sink and the local blocks are kept; at 0, all blocks up to the diagonal."""
    call, rule = make_call(385, queries=130, head_dim=32, heads=(2, 1)), LowBitParams(numerics, 64)
    forced = torch.from_numpy(oracle(call, rule, [1e4, 1e4]).forced)
    visible = TileBounds.of(call, rule).visible[0]
    for backend in ("torch", "triton"):
        sparse, dense = decide(call, rule, backend, tau=[1e4, 0.0])[0]
        assert torch.equal(sparse, forced)
        assert torch.equal(dense, torch.arange(13) < visible[:, None]) and torch.equal(sparse | dense, dense)


@pytest.mark.parametrize("numerics, softcap", [("int8", None), ("int8", 10.0), ("int4", None)])
def test_decisions_are_nested_in_tau(numerics: Numerics, softcap: float | None) -> None:
    call, rule = make_call(500, head_dim=32, heads=(2, 1), softcap=softcap, sharpness=0.7), LowBitParams(numerics, 32)
    previous = decide(call, rule, tau=[0.0] * 2)
    changes = 0
    for tau in (0.01, 0.1, 0.5, 2.0):
        bits = decide(call, rule, tau=[tau] * 2)
        assert not (bits & ~previous).any()
        changes += bool((bits != previous).any())
        previous = bits
    assert changes > 1


def test_int8_decides_nearly_as_exact_scores_do() -> None:
    found = {"int8": [0, 0, 0], "int4": [0, 0, 0]}
    for seed in range(3):
        call = make_call(448, head_dim=64, seed=seed, sharpness=0.7)
        tau = [0.01, 0.05, 0.1, 0.3]
        exact = oracle(call, LowBitParams("int8", 32), tau, "exact")
        candidate, kept = torch.from_numpy(~exact.forced), torch.from_numpy(exact.kept)
        for numerics, counts in found.items():
            bits = decide(call, LowBitParams(numerics, 32), tau=tau)[0] & candidate  # type: ignore[arg-type]
            for place, number in enumerate(((bits & kept).sum(), bits.sum(), (kept & candidate).sum())):
                counts[place] += int(number)
    quality = {name: (both / ours, both / theirs) for name, (both, ours, theirs) in found.items()}
    assert min(quality["int8"]) > 0.98 and found["int8"][2] > 50, quality
    assert min(quality["int4"]) > 0.85, quality


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_int4_estimates_lie_within_their_bound(dtype: torch.dtype) -> None:
    """The bound of the specification: half a step of each side, of both, and of the mean query's term."""
    call, rule = make_call(200, heads=(1, 1), head_dim=32, dtype=dtype), LowBitParams("int4")
    expected = oracle(call, rule, [1.0])
    q, k = call.q[0, 0].double(), call.k[0, 0].double()
    smooth_k = k - mean_key(call)[0, 0].double()
    smooth_q = q - mean_query(call)[0, 0].double()
    sq, sk = (torch.from_numpy(codes[0].scales).double() for codes in (expected.queries, expected.keys))
    products = torch.from_numpy(expected.queries[0].codes @ expected.keys[0].codes.T)
    term = (smooth_k @ mean_query(call)[0, 0].double() / sk)[None] / sq[:, None]
    estimate = (products + term.round()) * sq[:, None] * sk
    bound = smooth_q.abs().sum(-1)[:, None] * sk / 2 + smooth_k.abs().sum(-1) * sq[:, None] / 2
    bound = bound + (32 * sq[:, None] * sk / 4 + sq[:, None] * sk / 2)
    assert ((estimate - q @ smooth_k.T).abs() <= bound * (1 + 10 * torch.finfo(dtype).eps)).all()


@NUMERICS
def test_a_constant_added_to_all_keys_changes_nothing_beyond_rounding(numerics: Numerics) -> None:
    call, rule = make_call(500, head_dim=32), LowBitParams(numerics, 32)
    shifted = AttentionCall(**{**vars(call), "k": call.k + 8 * torch.randn(1, 2, 1, 32)})
    bits, moved = decide(call, rule), decide(shifted, rule)
    assert (bits != moved).float().mean() < 2e-3 and not bits.all()


@NUMERICS
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_tile_reads_no_later_token(numerics: Numerics, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the means (of all tokens) given, nothing after a tile affects its decisions."""
    call, rule = make_call(330, head_dim=32, heads=(1, 1)), LowBitParams(numerics, 32)
    means = mean_key(call), mean_query(call)
    module = in_torch if backend == "torch" else in_triton
    monkeypatch.setattr(module, "mean_key", lambda call: means[0])
    monkeypatch.setattr(module, "mean_query", lambda call: means[1])
    expected = decide(call, rule, backend)
    for garbage in (torch.nan, 1e4):
        q, k = call.q.clone(), call.k.clone()
        q[:, :, 256:], k[:, :, 256:] = garbage, garbage
        bits = decide(AttentionCall(**{**vars(call), "q": q, "k": k}), rule, backend)
        assert torch.equal(bits[:, :, :4], expected[:, :, :4])


@NUMERICS
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_garbage_stays_in_the_padding(numerics: Numerics, backend: str) -> None:
    batch, rule = make_call(260, row_starts=[0, 90], head_dim=16, heads=(1, 1)), LowBitParams(numerics, 32)
    expected = decide(batch, rule, backend)
    q, k = batch.q.clone(), batch.k.clone()
    q[1, :, :90], k[1, :, :90] = torch.nan, torch.nan
    assert torch.equal(decide(AttentionCall(**{**vars(batch), "q": q, "k": k}), rule, backend), expected)


@pytest.mark.parametrize("begin", [64, 256])
def test_a_chunk_from_the_edge_of_a_tile_decides_what_the_whole_prompt_would(begin: int) -> None:
    """In int4 the mean query is that of the chunk, so only the codes differ."""
    call = make_call(450, head_dim=32, heads=(2, 1))
    chunk = AttentionCall(**{**vars(call), "q": call.q[:, :, begin:], "q_start": begin})
    rule = LowBitParams("int8", 32)
    assert torch.equal(decide(chunk, rule), decide(call, rule)[:, :, begin // 64 :])
    rule = LowBitParams("int4", 32)
    assert (decide(chunk, rule) != decide(call, rule)[:, :, begin // 64 :]).float().mean() < 0.05


@NUMERICS
def test_rows_of_zeros(numerics: Numerics) -> None:
    """No scale of 0 divides."""
    call, rule = make_call(330, head_dim=32, heads=(2, 1)), LowBitParams(numerics, 32)
    q, k = call.q.clone(), call.k.clone()
    q[:, :, 100:200], k[:, :, :160] = 0, 0
    zeros = AttentionCall(**{**vars(call), "q": q, "k": k})
    assert torch.equal(decide(zeros, rule), decide(zeros, rule, "reference"))
    assert torch.equal(decide(zeros, rule), decide(zeros, rule, "triton"))


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(300, queries=250, row_starts=[0, 37], heads=(2, 1))
    expected = [decide(call, LowBitParams(numerics, 32)) for numerics in ("int8", "int4")]  # type: ignore[arg-type]
    monkeypatch.setattr(slices, "SLICE_BYTES", 1)
    for bits, numerics in zip(expected, ("int8", "int4"), strict=True):
        assert torch.equal(decide(call, LowBitParams(numerics, 32)), bits)  # type: ignore[arg-type]


def test_the_kernels_read_any_strides() -> None:
    call, rule = make_call(170, heads=(1, 1), head_dim=32), LowBitParams("int8", 32)
    across = AttentionCall(**{**vars(call), "q": call.q.mT.contiguous().mT, "k": call.k.mT.contiguous().mT})
    assert torch.equal(decide(across, rule, "triton"), decide(call, rule, "triton"))


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("queries", [400, 150, 210])
def test_tiles_hold_every_decision(block_size: int, queries: int) -> None:
    """A merged block is kept if and only if a decision in it is, at the true positions of both."""
    call = make_call(400, queries=queries, row_starts=[0, 37, 120])
    words = packed(torch.rand(3, 4, BlockGrid.of(call, 64).num_query_blocks, 32) < 0.05)
    grid, fine = BlockGrid.of(call, block_size), BlockGrid.of(call, 64)
    bits, blocks = unpacked(words), tiles(words, grid)
    for row in range(3):
        for place, query_block in enumerate(grid.query_block_ids[row].tolist()):
            mine = fine.query_block_ids[row] * 64 // block_size == query_block
            held = bits[row][:, mine].any(1).unflatten(-1, (-1, block_size // 32)).any(-1)
            assert torch.equal(blocks[row, :, place], held[:, : grid.num_key_blocks])


def test_the_pairs_of_decisions() -> None:
    call, rule = make_call(400, queries=190, row_starts=[0, 37], head_dim=16), LowBitParams("int8", 32)
    words = decisions(call, torch.tensor(TAU), rule)
    pairs_decided = decided_pairs(words, call)
    bits = unpacked(words)
    for row, start in enumerate((0, 37)):
        pairs = 0
        for query in range(210 - start, 400 - start):
            keys = torch.arange(query + 1)
            pairs += bits[row, 0, query // 64 - (210 - start) // 64, keys // 32].sum()
        assert pairs_decided[row, 0] == pairs
        causal = sum(range(210 - start + 1, 400 - start + 1))
        assert pairs < causal == pairs_decided[row, 3]
    plan = BlockPlan.from_blocks(tiles(words, BlockGrid.of(call, 64)), BlockGrid.of(call, 64))
    assert (plan.computed_pairs() >= pairs_decided).all()


def test_words_are_bits() -> None:
    bits = torch.rand(2, 3, 96) < 0.5
    assert torch.equal(unpacked(packed(bits)), bits)


def test_what_is_not_supported() -> None:
    call = make_call(100, head_dim=16)
    negative = AttentionCall(**{**vars(call), "scale": -1.0})
    assert "scale" in str(why_unsupported(negative, "torch")) and why_unsupported(call, "triton") is None
    wide = make_call(40, head_dim=272)
    with pytest.raises(UnsupportedCallError, match="head_dim 272"):
        decisions(wide, torch.ones(4), LowBitParams(), "triton")
