"""The profiles of the last queries, in Triton and in PyTorch, against attention written out."""

import pytest
import torch
from calls import make_call

from sparse_patch.ops.selection.last_queries.torch import last_query_profiles as in_torch
from sparse_patch.ops.selection.last_queries.triton import last_query_profiles as in_triton


@pytest.mark.parametrize("backend", [in_torch, in_triton], ids=["torch", "triton"])
@pytest.mark.parametrize(
    "length, queries, softcap",
    [
        (64, 16, None),
        (64, 64, None),
        (65, 64, 3.0),
        (127, 32, None),
        (129, 128, None),
        (300, 32, 3.0),
        (500, 128, None),
    ],
)
def test_profiles(backend: object, length: int, queries: int, softcap: float | None) -> None:
    starts = [0, 5] if length > 200 else None
    call = make_call(length, row_starts=starts, softcap=softcap, heads=(3, 1), head_dim=24)
    by_key, by_distance = backend(call, queries)  # type: ignore[operator]
    for row in range(call.q.shape[0]):
        start = starts[row] if starts else 0
        for head in range(3):
            logits = call.q[row, head, -queries:].double() @ call.k[row, 0].double().T * call.scale
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            query = torch.arange(length - queries, length)[:, None]
            key = torch.arange(length)
            hidden = (key > query) | (key < start)
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1) / queries
            torch.testing.assert_close(by_key[row, head].double(), weights.sum(0), atol=1e-6, rtol=1e-5)
            distance = torch.zeros(length, dtype=torch.double)
            distance.index_add_(0, (query - key).clamp(min=0).flatten(), weights.flatten())
            torch.testing.assert_close(by_distance[row, head].double(), distance, atol=1e-6, rtol=1e-5)
