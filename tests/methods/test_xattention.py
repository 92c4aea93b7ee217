"""XAttention against the slow oracle, and XAttention's own promises."""

import itertools

import pytest
import torch
from bound import bound
from calls import lengths_to_test, make_call, row_alone
from oracles.xattention import Selection, XAttentionSettings, xattention_selection
from pydantic import ValidationError

from sparse_patch.call import AttentionCall
from sparse_patch.kernels import slices
from sparse_patch.methods.xattention import XAttention
from sparse_patch.ops.selection.antidiagonal import block_masses
from sparse_patch.plans import BlockGrid, BlockPlan, Dense

# Float32 sums and the oracle's float64 ones may fall on different sides of a threshold that is closer than this.
MARGIN = 1e-5


def xattention(threshold: float = 0.9, stride: int = 4, block_size: int = 16) -> XAttention:
    return XAttention(threshold=threshold, stride=stride, block_size=block_size, min_length=0)  # type: ignore[arg-type]


def blocks_of(method: XAttention, call: AttentionCall) -> torch.Tensor:
    plan = bound(method).plan(call)
    assert isinstance(plan, BlockPlan)
    return plan.blocks()


def masses_of(call: AttentionCall, block_size: int, stride: int) -> torch.Tensor:
    """The masses of all slices together, `[B, Hq, NQ, N]`."""
    grid = BlockGrid.of(call, block_size)
    shape = (*call.q.shape[:2], grid.num_query_blocks, grid.num_key_blocks)
    together = torch.full(shape, torch.nan)
    for rows, masses in block_masses(call, grid, stride):
        together[:, :, rows] = 0
        together[:, :, rows, : masses.shape[-1]] = masses
    return together


def oracle(method: XAttention, call: AttentionCall) -> Selection:
    settings = XAttentionSettings(method.threshold, method.stride, method.block_size)
    return xattention_selection(
        call.q[0].double().numpy(), call.k[0].double().numpy(), call.scale, settings, call.softcap
    )


def compare_with_oracle(method: XAttention, call: AttentionCall) -> tuple[int, int]:
    """Assert equality unless a decision is within rounding of its threshold: `(rows compared, rows in doubt)`."""
    expected = oracle(method, call)
    masses = masses_of(call, method.block_size, method.stride)[0]
    torch.testing.assert_close(masses, torch.from_numpy(expected.masses).float(), atol=5e-6, rtol=1e-4)
    plan = bound(method).plan(call)
    blocks = plan.blocks()[0] if isinstance(plan, BlockPlan) else BlockGrid.of(call, method.block_size).causal
    clear = torch.from_numpy(expected.margins > MARGIN)
    wrong = (blocks != torch.from_numpy(expected.blocks)).any(-1) & clear
    assert not wrong.any(), f"head, query block: {wrong.nonzero().tolist()[:5]}"
    return int(clear.sum()), int((~clear).sum())


def test_the_plan_equals_the_oracle_at_every_length() -> None:
    compared = in_doubt = 0
    for number, length in enumerate(lengths_to_test(16)):
        heads = [(1, 1), (4, 1), (4, 4), (7, 1), (8, 2)][number % 5]
        method = xattention([0.5, 0.8, 0.95][number % 3], stride=[2, 4, 8, 16][number % 4])
        call = make_call(length, heads=heads, seed=number, softcap=[None, 5.0][number % 2])
        done, doubtful = compare_with_oracle(method, call)
        compared, in_doubt = compared + done, in_doubt + doubtful
    assert compared > 900 and in_doubt < 0.02 * compared


@pytest.mark.parametrize("block_size, stride", [(16, 1), (16, 8), (32, 4), (64, 16), (128, 32)])
def test_chunks_equal_the_oracle(block_size: int, stride: int) -> None:
    """Chunks begin on the edge of a block, inside a block and inside a group."""
    compared = 0
    for number, (length, queries) in enumerate(itertools.product((384, 301), (100, 128, 77))):
        call = make_call(length, queries=queries, heads=(4, 2), seed=number)
        compared += compare_with_oracle(xattention(0.8, stride, block_size), call)[0]
    assert compared > 20


@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (7, 1)], ids=str)
def test_the_plan_equals_the_oracle_at_1024(heads: tuple[int, int]) -> None:
    method, call = xattention(0.9, stride=8, block_size=64), make_call(1024, heads=heads, head_dim=32, sharpness=1.0)
    plan = bound(method).plan(call)
    assert isinstance(plan, BlockPlan) and plan.density().mean() < 0.95
    compared, in_doubt = compare_with_oracle(method, call)
    assert in_doubt <= 1 and compared + in_doubt == heads[0] * 16


@pytest.mark.parametrize("queries", [333, 150], ids=["whole", "chunk"])
def test_stride_1_is_the_mass_of_dense_attention(queries: int) -> None:
    """At stride 1 the tile on the diagonal is one token with itself, so nothing is estimated."""
    call = make_call(333, queries=queries, heads=(4, 2), softcap=20.0)
    logits = call.q @ call.k.repeat_interleave(2, 1).transpose(-1, -2) * call.scale
    causal = torch.ones(333, 333, dtype=torch.bool).tril()[333 - queries :]
    attention = (20.0 * (logits / 20.0).tanh()).masked_fill(~causal, -torch.inf).softmax(-1)
    first = (333 - queries) // 16 * 16
    for row, masses in enumerate(masses_of(call, 16, 1)[0].unbind(1)):
        begin, end = (max(0, first + 16 * (row + step) - (333 - queries)) for step in (0, 1))
        of_keys = attention[0, :, begin:end].mean(1)
        expected = torch.nn.functional.pad(of_keys, (0, 3)).unflatten(-1, (21, 16)).sum(-1)
        torch.testing.assert_close(masses, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 0.99])
def test_every_row_keeps_the_threshold_and_not_a_block_more(threshold: float) -> None:
    call = make_call(500, heads=(8, 2), sharpness=1.0)
    masses, blocks = masses_of(call, 16, 4), blocks_of(xattention(threshold), call)
    kept = masses * blocks
    torch.testing.assert_close(masses.sum(-1), torch.ones(masses.shape[:-1]))
    assert (kept.sum(-1) >= threshold - 1e-5).all()
    free = blocks.clone()  # what is kept for its mass alone
    free[..., 0] = False
    free &= ~torch.eye(blocks.shape[-1], dtype=torch.bool)
    smallest = kept.masked_fill(~free, torch.inf).min(-1).values
    assert (kept.sum(-1) - smallest < threshold + 1e-5).all()


def test_every_row_keeps_block_0_and_its_diagonal() -> None:
    call = make_call(500, queries=300)
    blocks = blocks_of(xattention(0.01), call)
    diagonal = BlockGrid.of(call, 16).query_block_ids[:, None, :, None].expand(*blocks.shape[:-1], 1)
    assert blocks[..., 0].all() and blocks.gather(-1, diagonal).all()
    assert blocks.sum(-1).max() == 2


def test_plans_are_nested_in_the_threshold() -> None:
    call = make_call(1200, sharpness=0.4)
    previous = blocks_of(xattention(0.1), call)
    for threshold in (0.3, 0.6, 0.9, 0.99):
        blocks = blocks_of(xattention(threshold), call)
        assert (blocks | ~previous).all() and (blocks != previous).any()
        previous = blocks


@pytest.mark.parametrize("begin", [64, 240, 384])
def test_a_chunk_from_a_block_edge_selects_what_the_whole_prompt_does(begin: int) -> None:
    call = make_call(500, heads=(4, 2))
    chunk = AttentionCall(**{**vars(call), "q": call.q[:, :, begin:], "q_start": begin})
    for method in (xattention(0.8), xattention(0.8, stride=16)):
        assert torch.equal(blocks_of(method, chunk), blocks_of(method, call)[:, :, begin // 16 :])


def test_selection_looks_at_nothing_behind_the_block() -> None:
    call = make_call(400)
    k, q = call.k.clone(), call.q.clone()
    k[:, :, 208:], q[:, :, 208:] = 9.0, -9.0
    changed = AttentionCall(**{**vars(call), "k": k, "q": q})
    blocks, expected = blocks_of(xattention(), changed), blocks_of(xattention(), call)
    assert torch.equal(blocks[:, :, :13], expected[:, :, :13])
    assert (blocks[:, :, 13:] != expected[:, :, 13:]).any()


@pytest.mark.parametrize("queries", [400, 150], ids=["whole", "chunk"])
def test_the_masses_of_a_padded_row_are_those_of_the_row_alone(queries: int) -> None:
    batch = make_call(400, queries=queries, row_starts=[0, 7, 64, 130, 399])
    masses = masses_of(batch, 32, 8)
    for row in range(5):
        expected = masses_of(row_alone(batch, row)[0], 32, 8)[0]
        rows, keys = expected.shape[1:]
        torch.testing.assert_close(masses[row, :, :rows, :keys], expected, atol=2e-6, rtol=1e-4)
        assert masses[row, :, rows:].eq(0).all() and masses[row, ..., keys:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_multiplied_in_float32_on_a_cpu(dtype: torch.dtype) -> None:
    call = make_call(400, dtype=dtype)
    wide = AttentionCall(**{**vars(call), "q": call.q.float(), "k": call.k.float()})
    assert torch.equal(blocks_of(xattention(), call), blocks_of(xattention(), wide)) or dtype == torch.bfloat16
    torch.testing.assert_close(masses_of(call, 16, 4), masses_of(wide, 16, 4), atol=1e-3, rtol=0.02)


@pytest.mark.parametrize("budget", [1, 3000, 40_000])
def test_the_size_of_the_slices_changes_nothing(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [make_call(200, queries=150, row_starts=[0, 37]), make_call(200)]
    methods = [xattention(), xattention(stride=1), xattention(stride=16)]
    expected = [blocks_of(method, call) for method in methods for call in calls]
    monkeypatch.setattr(slices, "SLICE_BYTES", budget)
    for blocks, (method, call) in zip(expected, itertools.product(methods, calls), strict=True):
        assert torch.equal(blocks_of(method, call), blocks)


@pytest.mark.parametrize("length, bytes_each, step, sizes", [
    (10, 100, 1, [10]), (10, 400, 1, [2] * 5), (10, 5000, 1, [1] * 10), (20, 150, 4, [4] * 5), (8, 350, 4, [2] * 4),
])  # fmt: skip
def test_slices(length: int, bytes_each: int, step: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_BYTES", 1000)
    parts = list(slices.slices(length, bytes_each, step))
    assert [part.stop - part.start for part in parts] == sizes
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(length))


def test_softcap_and_scale_reach_the_selection() -> None:
    call = make_call(500, sharpness=3.0)
    base = blocks_of(xattention(), call)
    for change in ({"softcap": 0.5}, {"scale": 0.01}):
        assert (blocks_of(xattention(), AttentionCall(**{**vars(call), **change})) != base).any()


def test_threshold_1_and_two_blocks_are_dense() -> None:
    assert isinstance(bound(xattention(1.0)).plan(make_call(400)), Dense)
    assert isinstance(bound(xattention(0.1)).plan(make_call(32)), Dense)
    assert isinstance(bound(xattention(0.1)).plan(make_call(33)), BlockPlan)


@pytest.mark.parametrize(
    "change", [{"threshold": 0.0}, {"threshold": 1.1}, {"stride": 0}, {"stride": 12}, {"stride": 256}]
)
def test_bad_settings_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(change))):
        XAttention.model_validate(change)
