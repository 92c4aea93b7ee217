"""Every backend of the span op against the oracle, and the oracle against the definition."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from calls import make_call, row_alone
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops.attention.span import attend, fastest, why_unsupported
from sparse_patch.ops.attention.span.triton import flat, span_attention
from sparse_patch.plans import GrowingWindow, SpanPlan, Window

FAST = ["torch", "triton"]
EVERYWHERE = ["reference", *FAST]
# Rounding of float32 logits of about 40, times values of 3; in half precision, of the output.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
HALF, SLOW, STEADY = (
    GrowingWindow(-5 << 16, 1 << 15, 3, 90),
    GrowingWindow(0, 9999, 1, 999),
    GrowingWindow(0, 0, 33, 50),
)
# Sinks and windows of two KV heads: shorter than a tile, at its edges, longer than any prompt here, none, and growing.
SPANS: list[tuple[tuple[int, ...], tuple[Window, ...]]] = [
    ((4, 0), (HALF, SLOW)),
    ((0, 70), (STEADY, GrowingWindow(200 << 16, 1 << 16, 1, 1 << 40))),
    ((4, 0), (1, 30)),
    ((64, 63), (64, 65)),
    ((3, 0), (None, 7)),
    ((100, 1), (129, 500)),
    ((999, 0), (1, 1)),
]


def assert_matches(call: AttentionCall, plan: SpanPlan, backend: str) -> None:
    expected, expected_lse, _ = attend(call, plan, "reference", return_lse=True)
    output, lse, _ = attend(call, plan, backend, return_lse=True)
    assert output.dtype == call.q.dtype and output.shape == expected.shape
    tolerance = TOLERANCE[call.q.dtype]
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("spans", SPANS, ids=str)
def test_spans_and_lengths(backend: str, spans: tuple[tuple[int, ...], tuple[Window, ...]]) -> None:
    for length in (1, 3, 63, 64, 65, 130, 300):
        call = make_call(length, heads=(2, 2))
        assert_matches(call, SpanPlan.of(call, *spans), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1), (8, 1)], ids=str)
def test_random_spans_by_groups(backend: str, heads: tuple[int, int]) -> None:
    call = make_call(150, heads=heads)
    for _ in range(2):
        sinks = torch.randint(0, 70, heads[1:]).tolist()
        windows = [None if window > 120 else window for window in torch.randint(1, 160, heads[1:]).tolist()]
        assert_matches(call, SpanPlan.of(call, sinks, windows), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (96, 64), (128, 128), (192, 128), (256, 256)])
def test_head_dims_and_dtypes(backend: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly; tests/test_gpu_span.py has it")
    call = make_call(150, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    assert_matches(call, SpanPlan.of(call, (5, 40), (33, None)), backend)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("queries, softcap", [(200, None), (96, 2.0), (33, None), (1, 2.0)])
@pytest.mark.parametrize("spans", SPANS, ids=str)
def test_padding_chunks_and_softcap(
    backend: str, queries: int, softcap: float | None, spans: tuple[tuple[int, ...], tuple[Window, ...]]
) -> None:
    call = make_call(200, queries=queries, row_starts=[0, 150, 200], softcap=softcap, heads=(2, 2))
    k, v = call.k.clone(), call.v.clone()
    for row, start in enumerate([0, 150, 200]):
        k[row, :, :start], v[row, :, :start] = torch.nan, torch.nan
    call = replace(call, k=k, v=v)
    assert_matches(call, SpanPlan.of(call, *spans), backend)
    if queries <= 33:  # as a step over a static buffer
        k, v = (F.pad(x, (0, 0, 0, 70), value=torch.nan) for x in (k, v))
        static = replace(call, k=k, v=v, q_start=0, kv_end=torch.tensor(200), phase="decode")
        assert_matches(static, SpanPlan.of(static, *spans), backend)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("split", [13, 64, 101])
@pytest.mark.parametrize("windows", [(20, 64), (HALF, SLOW)], ids=["fixed", "growing"])
def test_chunks_equal_one_shot(backend: str, windows: tuple[Window, ...], split: int) -> None:
    call = make_call(130, row_starts=[0, 17])
    whole, lse, _ = attend(call, SpanPlan.of(call, (9, 30), windows), backend, return_lse=True)
    for begin in range(0, 130, split):
        end = min(begin + split, 130)
        chunk = replace(call, q=call.q[:, :, begin:end], k=call.k[:, :, :end], v=call.v[:, :, :end], q_start=begin)
        output, chunk_lse, _ = attend(chunk, SpanPlan.of(chunk, (9, 30), windows), backend, return_lse=True)
        torch.testing.assert_close(output, whole[:, :, begin:end], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(chunk_lse, lse[:, :, begin:end], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_a_row_that_began_before_its_keys(backend: str) -> None:
    """A negative `kv_start`: only the last keys of a call, and queries that need no other keys."""
    call = make_call(160, queries=70, row_starts=[0, 30])
    expected, _, _ = attend(call, SpanPlan.of(call, (0, 0), (21, 3)), backend)
    rest = replace(call, k=call.k[:, :, 70:], v=call.v[:, :, 70:], q_start=20, kv_start=call.kv_start - 70)
    output, _, _ = attend(rest, SpanPlan.of(rest, (50, 9), (21, 3)), backend)  # both rows' sinks are gone
    torch.testing.assert_close(output[0], expected[0], atol=2e-5, rtol=2e-5)
    assert_matches(rest, SpanPlan.of(rest, (80, 75), (21, 3)), backend)  # not all of them


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_spans_of_everything_equal_dense_attention(backend: str) -> None:
    call = make_call(333, heads=(8, 2), head_dim=64)
    plan = SpanPlan.of(call, (0, 7), (None, 333))
    expected = F.scaled_dot_product_attention(call.q, call.k, call.v, is_causal=True, scale=call.scale, enable_gqa=True)
    torch.testing.assert_close(attend(call, plan, backend)[0], expected, atol=2e-5, rtol=1e-5)
    assert plan.density().eq(1).all()


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_padded_rows_equal_rows_alone(backend: str) -> None:
    call = make_call(150, queries=90, row_starts=[0, 47, 100])
    output, lse, _ = attend(call, SpanPlan.of(call, (4, 20), (10, 33)), backend, return_lse=True)
    for row in range(3):
        alone, queries = row_alone(call, row)
        expected, expected_lse, _ = attend(alone, SpanPlan.of(alone, (4, 20), (10, 33)), backend, return_lse=True)
        torch.testing.assert_close(output[row, :, queries], expected[0], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(lse[row, :, queries], expected_lse[0], atol=2e-5, rtol=2e-5)
        assert output[row, :, : queries.start].eq(0).all() and lse[row, :, : queries.start].isneginf().all()


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_the_future_and_what_lies_outside_of_the_spans_changes_nothing(backend: str) -> None:
    call = make_call(256)
    plan = SpanPlan.of(call, (10, 0), (40, 40))
    expected, _, _ = attend(call, plan, backend)
    k, v = call.k.clone(), call.v.clone()
    k[:, :, 60:64], v[:, :, 60:64] = 30.0, 1e6
    output, _, _ = attend(replace(call, k=k, v=v), plan, backend)
    unchanged = [*range(60), *range(103, 256)]
    assert torch.equal(output[:, :, unchanged], expected[:, :, unchanged])
    assert (output[:, :, 60:103] != expected[:, :, 60:103]).any(-1).all()


@pytest.mark.parametrize("backend", FAST)
def test_strides(backend: str) -> None:
    call = make_call(150, row_starts=[0, 20])
    plan = SpanPlan.of(call, (4, 20), (10, 33))
    expected, _, _ = attend(call, plan, "reference")
    wide = torch.full((2, 2, 200, 50), torch.nan)
    for moved in (
        replace(call, k=wide[:, :, 13:163, 7:23].copy_(call.k)),
        replace(call, v=call.v.transpose(0, 1).contiguous().transpose(0, 1)),
        replace(call, k=call.k.mT.contiguous().mT, v=call.v.mT.contiguous().mT, q=call.q.mT.contiguous().mT),
    ):
        torch.testing.assert_close(attend(moved, plan, backend)[0], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_no_value_is_read_on_the_host(backend: str) -> None:
    call = make_call(100, queries=40, row_starts=[0, 20])
    with FakeTensorMode() as mode:  # reading a value raises
        q, k, v, starts, end = (mode.from_tensor(x) for x in (call.q, call.k, call.v, call.kv_start, torch.tensor(90)))
        for kv_end in (None, end):
            fake = replace(call, q=q, k=k, v=v, kv_start=starts, kv_end=kv_end)
            assert attend(fake, SpanPlan.of(fake, (4, 20), (10, None)), backend)[0].shape == call.q.shape


def test_the_custom_op_is_sound() -> None:
    """Its fake has the shapes, dtypes and strides of the real one."""
    call = make_call(70, row_starts=[0, 20], dtype=torch.float16)
    arguments = (call.q, call.k, call.v, call.kv_start, None, [4, 0], flat((10, None)), 0.3, 0.0)
    for in_float32 in (False, True):
        torch.library.opcheck(span_attention.op, (*arguments, in_float32))


def test_backends_say_what_they_do_not_serve() -> None:
    call = make_call(20, head_dim=272)
    plan = SpanPlan.of(call, (1, 1), (2, 2))
    assert fastest(call, plan) == "torch" and why_unsupported(call, plan, "auto") is None
    assert why_unsupported(call, plan, "triton") == "backend triton: head_dim 272 is above 256"
    with pytest.raises(UnsupportedCallError, match="head_dim 272"):
        attend(call, plan, "triton")
