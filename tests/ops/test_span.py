"""Every backend of the span op against the oracle, and the oracle against the definition."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from calls import make_call, row_alone
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops.span import attend, fastest, unsupported
from sparse_patch.ops.span.triton import EVERY, span_attention
from sparse_patch.plans import SpanPlan

FAST = ["torch", "triton"]
EVERYWHERE = ["reference", *FAST]
# Rounding of float32 logits of about 40, times values of 3; in half precision of the output.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Sinks and windows of two KV heads: shorter than a tile, at its edges, longer than any prompt here, and none.
SPANS = [
    ((4, 0), (1, 30)),
    ((64, 63), (64, 65)),
    ((3, 0), (None, 7)),
    ((100, 1), (129, 500)),
    ((999, 0), (1, 1)),
]


def assert_matches(call: AttentionCall, plan: SpanPlan, backend: str) -> None:
    expected, expected_lse = attend(call, plan, "reference")
    output, lse = attend(call, plan, backend)
    assert output.dtype == call.q.dtype and output.shape == expected.shape
    tolerance = TOLERANCE[call.q.dtype]
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("spans", SPANS, ids=str)
def test_spans_and_lengths(backend: str, spans: tuple[tuple[int, ...], tuple[int | None, ...]]) -> None:
    for length in (1, 3, 63, 64, 65, 130, 300):
        call = make_call(length, heads=(2, 2))
        assert_matches(call, SpanPlan.of(call, *spans), backend)
