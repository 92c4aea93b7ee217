"""Spans and rings on a GPU; skipped without a GPU."""

from dataclasses import replace

import pytest
import torch
from builders.gpu import no_waits, on_gpu
from builders.rings import assert_ring_matches
from calls import make_call
from families import llama

from sparse_patch import growing_cache, patched
from sparse_patch.integration.caches.rings import FixedRingLayer, RingLayer
from sparse_patch.ops.attention import span
from sparse_patch.ops.attention.span_ring import Ring, RingLayout, attend, tokens_before, write
from sparse_patch.plans import GrowingWindow, SpanPlan

pytestmark = pytest.mark.gpu
GROWING = (4, 64), (GrowingWindow(-50 << 16, 1 << 15, 3, 600), GrowingWindow(100 << 16, 20000, 1, 450))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# As in tests/ops, with room for sums over more keys in another order.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (96, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (14, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spans_on_the_gpu(head_dim: int, value_dim: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    for queries, softcap in ((1300, None), (500, 5.0), (1, None)):
        shape = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim, "dtype": dtype}
        call = on_gpu(make_call(1300, queries=queries, row_starts=[0, 77, 900], softcap=softcap, **shape))
        for spans in (((4, 0), (1, 200)), ((64, 64), (256, None)), ((999, 3), (1, 2000)), GROWING):
            plan = SpanPlan.of(call, *spans)
            (output, lse, _), (expected, expected_lse, _) = (
                span.attend(call, plan, name, return_lse=True) for name in ("triton", "reference")
            )
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=1e-3)


def test_spans_beyond_32_bits() -> None:
    call = on_gpu(make_call(300, heads=(2, 2), head_dim=64, dtype=torch.bfloat16))
    plan = SpanPlan.of(call, (4, 0), (100, None))
    far = torch.empty(2**31 + 2**24, dtype=torch.bfloat16, device="cuda")
    heads_apart = far.as_strided(call.k.shape, (0, 2**31, 64, 1))
    expected, _, _ = span.attend(call, plan, "triton")
    for name in ("k", "v", "q"):
        moved = replace(call, **{name: heads_apart.copy_(getattr(call, name))})
        assert torch.equal(span.attend(moved, plan, "triton")[0], expected)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (96, 64), (128, 128), (256, 256)])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (14, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rings_on_the_gpu(
    head_dim: int, value_dim: int, heads: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builders.rings.TOLERANCE", TOLERANCE)
    monkeypatch.setattr("builders.rings.LSE_TOLERANCE", 2e-3)
    shape = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim, "dtype": dtype}
    call = on_gpu(make_call(1300, row_starts=[0, 77, 900], **shape))
    for spans in (((4, 0), (1, 200)), ((64, 64), (256, None)), ((64, 0), (700, 640)), GROWING):
        assert_ring_matches(call, spans, [500, 300, 489, *[1] * 11], "triton")


def test_a_captured_step_serves_every_length_without_a_wait() -> None:
    """The graph of one length is replayed at others, without a host sync: the ring fills and turns over twice."""
    call = on_gpu(make_call(700, heads=(8, 2), head_dim=128, row_starts=[0, 70], dtype=torch.bfloat16))
    layout, seen = RingLayout.of((4, 64), (100, 400), room=1000), torch.zeros((), dtype=torch.int64, device="cuda")
    ring, plain = (Ring.empty(layout, call.k, call.v) for _ in range(2))
    now = replace(call, q=call.q[:, :, :1].clone(), k=call.k[:, :, :1].clone(), v=call.v[:, :, :1].clone())

    def step(ring: Ring) -> torch.Tensor:
        before = tokens_before(seen, call.kv_start, 2, call.q.device)
        write(ring, now.k, now.v, before, "triton")
        return attend(now, ring, before, "triton")[0]

    step(plain)
    with no_waits():
        step(plain)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(ring)
    plan = SpanPlan.of(call, layout.sinks, layout.windows)
    expected, _, _ = span.attend(call, plan, "reference")
    for position in range(700):
        token = slice(position, position + 1)
        for target, source in ((now.q, call.q), (now.k, call.k), (now.v, call.v)):
            target.copy_(source[:, :, token])
        seen.fill_(position)
        graph.replay()
        assert torch.equal(captured, step(plain))
        torch.testing.assert_close(captured, expected[:, :, token], atol=3e-2, rtol=3e-2)


def test_forwards_do_not_wait_for_the_gpu() -> None:
    call = on_gpu(make_call(300, heads=(8, 2), head_dim=64, row_starts=[0, 70], dtype=torch.float16))
    layout = RingLayout.of((4, 64), (100, 400), room=1000)
    ring, before = Ring.empty(layout, call.k, call.v), tokens_before(40, None, 2, call.q.device)

    def forward() -> None:
        attend(call, ring, before)
        write(ring, call.k, call.v, before)
        span.attend(call, SpanPlan.of(call, layout.sinks, layout.windows))

    forward()
    with no_waits():
        forward()


def test_generate_with_rings_on_the_gpu() -> None:
    """Growing rings, and those of a static cache with captured steps, give what a cache of all keys gives."""
    torch._dynamo.reset()
    model = llama().cuda()  # type: ignore[call-arg]
    ids = torch.randint(3, 90, (2, 70), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    settings = {"max_new_tokens": 40, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with patched(model, {"both": {"method": "streamingllm", "sink": 4, "window": 17}, "on_unsupported": "error"}):
        expected = model.generate(
            ids, attention_mask=mask, past_key_values=growing_cache(model.config), disable_compile=True, **settings
        )
        for cache, layer in (("dynamic", RingLayer), ("static", FixedRingLayer), ("static", FixedRingLayer)):
            found = model.generate(ids, attention_mask=mask, cache_implementation=cache, **settings)
            assert all(type(made) is layer for made in found.past_key_values.layers)
            torch.testing.assert_close(
                torch.stack(found.logits), torch.stack(expected.logits), atol=1e-3, rtol=1e-3, msg=cache
            )
    torch._dynamo.reset()
