"""Forwards through a ring, against plain attention by the same spans over all keys."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention import span
from sparse_patch.ops.attention.span_ring import Ring, RingLayout, attend, tokens_before, write
from sparse_patch.plans import SpanPlan

# Rounding of float32 logits of about 40, times values of 3; in half precision of the output.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
LSE_TOLERANCE = 2e-5


def forwards(call: AttentionCall, lengths: Sequence[int]) -> list[AttentionCall]:
    """The call cut into forwards that see only their own keys."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    assert ends[-1] == call.q.shape[2]
    parts = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    return [
        replace(call, q=call.q[:, :, part], k=call.k[:, :, part], v=call.v[:, :, part], q_start=part.start)
        for part in parts
    ]


def run_ring(
    call: AttentionCall, layout: RingLayout, lengths: Sequence[int], backend: str, seen_on_device: bool = False
) -> tuple[torch.Tensor, torch.Tensor, Ring]:
    """All forwards, one after the other: outputs and LSEs behind one another, and the ring that is left."""
    ring, results = Ring.empty(layout, call.k, call.v), []
    for part in forwards(call, lengths):
        seen = torch.tensor(part.q_start, device=call.q.device) if seen_on_device else part.q_start
        before = tokens_before(seen, call.kv_start, len(call.q), call.q.device)
        if part.q.shape[2] == 1:
            write(ring, part.k, part.v, before, backend)
            results.append(attend(part, ring, before, backend)[:2])
        else:
            results.append(attend(part, ring, before, backend)[:2])
            write(ring, part.k, part.v, before, backend)
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2), ring


def assert_ring_matches(call: AttentionCall, spans: Any, lengths: Sequence[int], backend: str, **options: Any) -> None:
    expected, expected_lse, _ = span.attend(call, SpanPlan.of(call, *spans), "reference", return_lse=True)
    layout = RingLayout.of(*spans, room=call.kv_length)
    output, lse, _ = run_ring(call, layout, lengths, backend, **options)
    assert output.dtype == call.q.dtype and output.shape == expected.shape
    tolerance = TOLERANCE[call.q.dtype]
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=LSE_TOLERANCE, rtol=1e-5)
