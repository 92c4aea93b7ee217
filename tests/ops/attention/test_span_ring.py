"""Every backend of the ring against plain attention with the same spans over all keys ever seen, and against counts."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders.rings import TOLERANCE, assert_ring_matches, forwards, run_ring
from calls import make_call
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops.attention import span
from sparse_patch.ops.attention.span.triton import flat
from sparse_patch.ops.attention.span_ring import (
    Ring,
    RingLayout,
    attend,
    fastest,
    launches,
    tokens_before,
    why_unsupported,
    write,
)
from sparse_patch.ops.attention.span_ring import triton as kernels
from sparse_patch.ops.attention.span_ring.triton import span_ring_attention, span_ring_write
from sparse_patch.plans import GrowingWindow, SpanPlan, Window, widest

FAST = ["torch", "triton"]
EVERYWHERE = ["reference", *FAST]
GROWING = GrowingWindow(-4 << 16, 1 << 15, 2, 20)
SPANS: dict[str, tuple[tuple[int, ...], tuple[Window, ...]]] = {
    "growing": ((4, 0), (GROWING, GrowingWindow(3 << 16, 20000, 1, 16))),
    "one grows": ((0, 20), (13, GROWING)),
    "alike": ((4, 4), (13, 13)),
    "unlike": ((0, 20), (1, 40)),
    "one keeps everything": ((3, 7), (None, 9)),
    "longer than the prompt": ((300, 2), (5, 300)),
}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pieces of 16 slots, so that small rings have several."""
    monkeypatch.setattr(launches, "piece_of", lambda capacities: 16)
    launches.launch_of.cache_clear()
    yield
    launches.launch_of.cache_clear()


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("row_starts", [None, [0, 11]])
def test_what_the_slots_hold_after_every_forward(backend: str, row_starts: list[int] | None) -> None:
    sinks, windows = (0, 3, 5, 25, 2), (1, 4, GrowingWindow(0, 1 << 14, 1, 10), 3, None)
    layout = RingLayout.of(sinks, windows, room=40)
    assert layout.capacities == (1, 7, 15, 28, 40) and layout.starts == [0, 1, 8, 23, 51] and layout.total == 91
    batch = len(row_starts or [0])
    k = torch.arange(40.0).expand(batch, 5, 40)[..., None].repeat(1, 1, 1, 3)
    starts = torch.tensor(row_starts) if row_starts else None
    for lengths in ([1] * 40, [40], [2, 13, 1, 1, 23], [16, 7, 17]):
        ring, seen = Ring.empty(layout, k + 1, k + 1), 0
        for length in lengths:
            new = k[:, :, seen : seen + length]
            write(ring, new, -new, tokens_before(seen, starts, batch, k.device), backend)
            seen += length
            for row, start in enumerate(row_starts or [0]):
                for head, (sink, window) in enumerate(layout.spans):
                    tokens = max(seen - start, 0)
                    last = tokens if window is None else widest(window)
                    stored = {*range(min(sink, tokens)), *range(max(tokens - last, 0), tokens)}
                    first = layout.starts[head]
                    slots = torch.tensor(sorted(stored), dtype=torch.long)
                    (run,) = (run for run in layout.runs if run.heads.start <= head < run.heads.stop)
                    where = first + run.places(slots)
                    assert where.tolist() == [
                        first + (p if p < sink else sink + (p - sink) % run.turn) for p in sorted(stored)
                    ]
                    assert ring.k[row, where].eq((slots + start)[:, None]).all()
                    assert ring.v[row, where].eq(-(slots + start)[:, None]).all()
                    held = layout.positions(torch.tensor([tokens]))[0, layout.slices[head]]
                    assert sorted(held[held >= 0].tolist()) == sorted(stored)
                    others = held == -1
                    assert ring.k[row, layout.slices[head]][others].eq(0).all()


@pytest.mark.usefixtures("poisoned", "small_pieces")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("lengths", [[60], [1, 40, 7, 12], [2, 57, 1]], ids=str)
def test_any_split_equals_one_shot(backend: str, spans: Any, lengths: list[int]) -> None:
    assert_ring_matches(make_call(60, row_starts=[0, 41]), spans, lengths, backend)


@pytest.mark.usefixtures("poisoned", "small_pieces")
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_token_by_token_around_every_turn(backend: str) -> None:
    """Capacities of 5, 10 and 17 slots are filled and turned over once or more, beside one that keeps everything."""
    call = make_call(36, heads=(4, 4), row_starts=[0, 3])
    assert_ring_matches(call, ((0, 4, 12, 5), (5, 6, 5, None)), [1] * 36, backend, seen_on_device=True)
    assert_ring_matches(call, ((0, 4, 12, 5), (5, GROWING, 5, None)), [1] * 36, backend, seen_on_device=True)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_a_length_on_the_host_gives_the_same(backend: str, spans: Any, softcap: float | None) -> None:
    call = make_call(60, heads=(8, 2), softcap=softcap)
    layout, (prompt, *tokens) = RingLayout.of(*spans, room=60), forwards(call, [19, *[1] * 41])
    rings = [Ring.empty(layout, call.k, call.v) for _ in range(2)]
    for ring in rings:
        write(ring, prompt.k, prompt.v, torch.zeros(len(call.q), dtype=torch.int64), backend)
    for token in tokens:
        before, outs = torch.full((len(call.q),), token.q_start), []
        for ring, known in zip(rings, (None, token.q_start), strict=True):
            write(ring, token.k, token.v, before, backend, known)
            outs.append(attend(token, ring, before, backend, known, return_lse=known is None).out)
        assert torch.equal(rings[0].k, rings[1].k) and torch.equal(rings[0].v, rings[1].v)
        torch.testing.assert_close(*outs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (7, 1), (8, 1)], ids=str)
def test_groups_and_softcap(backend: str, heads: tuple[int, int]) -> None:
    call = make_call(50, heads=heads, softcap=2.0)
    assert_ring_matches(call, ((4, 0)[: heads[1]], (13, 30)[: heads[1]]), [20, 25, *[1] * 5], backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (96, 64), (128, 128), (192, 128), (256, 256)])
def test_head_dims_and_dtypes(backend: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly; tests/test_gpu_span.py has it")
    call = make_call(40, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    assert_ring_matches(call, ((4, 0), (13, None)), [20, 18, 1, 1], backend)


@pytest.mark.parametrize("backend", FAST)
def test_long_forwards_and_real_pieces(backend: str) -> None:
    """Several tiles of queries and of slots, and heads that need one, two and three pieces."""
    call = make_call(700, heads=(2, 2))
    assert_ring_matches(call, ((64, 0), (300, 540)), [500, 197, 1, 1, 1], backend)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_the_order_of_slots_does_not_matter_and_no_other_is_read(backend: str) -> None:
    call = make_call(30, heads=(2, 2))
    layout = RingLayout.of((3, 0), (10, 50), room=100)  # the second head is not full
    expected, _, ring = run_ring(call, layout, [27, 1, 1, 1], backend)
    step = forwards(call, [29, 1])[1]
    before = torch.tensor([29])
    full = torch.arange(13)[torch.randperm(13)]
    shuffled = replace(ring, k=ring.k.clone(), v=ring.v.clone())
    shuffled.k[:, :13], shuffled.v[:, :13] = ring.k[:, full], ring.v[:, full]
    shuffled.k[:, 13 + 30 :], shuffled.v[:, 13 + 30 :] = 40.0, 1e6
    output, _, _ = attend(step, shuffled, before, backend)
    torch.testing.assert_close(output, expected[:, :, -1:], atol=1e-5, rtol=1e-5)
    shuffled.v[:, 4] += 1.0
    assert (attend(step, shuffled, before, backend)[0][:, 0] != output[:, 0]).all()


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_no_future_token_is_read(backend: str) -> None:
    call = make_call(40)
    layout = RingLayout.of((4, 2), (13, 6), room=40)
    expected, _, _ = run_ring(call, layout, [15, 25], backend)
    k, v = call.k.clone(), call.v.clone()
    k[:, :, 30:], v[:, :, 30:] = 30.0, 1e6
    output, _, _ = run_ring(replace(call, k=k, v=v), layout, [15, 25], backend)
    assert torch.equal(output[:, :, :30], expected[:, :, :30])
    assert (output[:, :, 30:] != expected[:, :, 30:]).any(-1).all()


@pytest.mark.parametrize("backend", FAST)
def test_a_head_that_outgrows_its_room_keeps_a_window(backend: str) -> None:
    call = make_call(30, heads=(2, 2))
    layout = RingLayout((2, 0), (None, 5), (12, 5))
    output, _, _ = run_ring(call, layout, [1] * 30, backend)
    expected, _, _ = span.attend(call, SpanPlan.of(call, (0, 0), (12, 5)), "reference")
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=2e-5)


def test_a_long_span_needs_no_turns() -> None:
    layout = RingLayout.of((4, 60, 8), (50, 50, None), room=100)
    assert layout.windows == (50, None, None) and layout.capacities == (54, 100, 100)


@pytest.mark.parametrize(
    "numbers, message",
    [
        (((1,), (2, 2), (3, 4)), "got 1 and 2"),
        (((1, 1), (2, 0), (3, 1)), "a window 1 or more"),
        (((1, 1), (2, 2), (3, 4)), "capacities"),
        (((1, 1), (2, None), (3, 0)), "capacities"),
    ],
)
def test_what_is_no_layout_is_refused(numbers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RingLayout(*numbers)


LAYOUT = RingLayout((4, 0), (10, None), (14, 30))


def step(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    seen: Any,
) -> torch.Tensor:
    """One step of decode over a cache whose length only the device knows, with a batch of two rows."""
    before = tokens_before(seen, torch.tensor([0, 9], device=q.device), 2, q.device)
    ring = Ring(LAYOUT, ring_k, ring_v)
    write(ring, k, v, before, backend)
    return attend(AttentionCall(q, k, v, 0.3, 0, "decode"), ring, before, backend)[0]


def step_arguments() -> tuple[torch.Tensor, ...]:
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16)
    return q, k, v, torch.randn(2, LAYOUT.total, 16), torch.randn(2, LAYOUT.total, 16), torch.tensor(25)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_no_value_is_read_on_the_host(backend: str) -> None:
    with FakeTensorMode() as mode:  # reading a value raises
        tensors = [mode.from_tensor(x) for x in step_arguments()]
        assert step(backend, *tensors).shape == (2, 4, 1, 16)
        q, k, v = (x.expand(-1, -1, 50, -1) for x in tensors[:3])
        ring, before = Ring(LAYOUT, *tensors[3:5]), tokens_before(tensors[5], None, 2, q.device)
        assert attend(AttentionCall(q, k, v, 0.3, 0, "prefill"), ring, before, backend)[0].shape == q.shape
        write(ring, k, v, before, backend)


@pytest.mark.parametrize("backend", FAST)
def test_compiles_in_one_graph(backend: str) -> None:
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    arguments = step_arguments()
    copies = [x.clone() for x in arguments]
    torch.testing.assert_close(compiled(backend, *arguments), step(backend, *copies), atol=1e-6, rtol=1e-6)
    assert torch.equal(arguments[3], copies[3]) and torch.equal(arguments[4], copies[4])


def test_after_prepare_a_step_brings_nothing_to_the_device() -> None:
    layout = RingLayout.of((3, 0), (11, None), 57)
    call = make_call(1, heads=(4, 2))
    ring, before = Ring.empty(layout, call.k, call.v), torch.tensor([7])
    kernels.prepare(layout, call.q.device)
    known = launches.heads_of.cache_info().misses, launches.pieces_of.cache_info().misses
    write(ring, call.k, call.v, before, "triton")
    attend(call, ring, before, "triton")
    assert (launches.heads_of.cache_info().misses, launches.pieces_of.cache_info().misses) == known


def test_the_custom_ops_are_sound() -> None:
    """Their fakes have the shapes, dtypes and strides of the real ones, and the ops write what they declare."""
    q, k, v, ring_k, ring_v, _ = step_arguments()
    before, spans = torch.tensor([20, -1]), ((4, 0), flat((10, None)), LAYOUT.capacities)
    torch.library.opcheck(span_ring_attention.op, (q, ring_k, ring_v, before, None, None, *spans, 0.3, 0.0))
    own = torch.randn(2, 4, 1, 16), torch.randn(2, 4, 1)
    torch.library.opcheck(span_ring_attention.op, (q, ring_k, ring_v, before, *own, *spans, 0.3, 1.0))
    torch.library.opcheck(span_ring_write.op, (ring_k, ring_v, k, v, before, (4, 0), LAYOUT.capacities))


def test_backends_say_what_they_do_not_serve() -> None:
    call = make_call(20, head_dim=272)
    assert fastest(call) == "torch" and why_unsupported(call, "auto") is None
    assert why_unsupported(call, "triton") == "backend triton: head_dim 272 is above 256"
    ring = Ring.empty(RingLayout.of((1, 1), (2, 2), room=20), call.k, call.v)
    with pytest.raises(UnsupportedCallError, match="head_dim 272"):
        attend(call, ring, torch.tensor([0]), "triton")
