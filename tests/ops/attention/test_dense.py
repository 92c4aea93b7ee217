"""The dense kernels that run on a CPU, and what the other kernels refuse."""

from typing import Any

import pytest
import torch
from calls import make_call

from sparse_patch import UnsupportedCallError
from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention import flash_attn_4
from sparse_patch.ops.attention.dense import KERNELS, attend, dispatch, fastest, why_unsupported


def oracle(call: AttentionCall) -> torch.Tensor:
    """A float32 softmax over the causal triangle, aligned at the bottom right."""
    queries, keys = call.q.shape[2], call.kv_length
    k, v = (x.float().repeat_interleave(call.group_size, dim=1) for x in (call.k, call.v))
    logits = call.q.float() @ k.transpose(-1, -2) * call.scale
    above = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return (logits.masked_fill(above, -torch.inf).softmax(-1) @ v).to(call.q.dtype)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("head_dim, value_dim", [(16, 16), (64, 64), (96, 64)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 1.6e-2)], ids=str)
def test_sdpa_against_a_softmax(
    heads: tuple[int, int], head_dim: int, value_dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    call = make_call(150, heads=heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    output = attend(call, "sdpa").out
    assert output.shape == (1, heads[0], 150, value_dim) and output.dtype == dtype
    torch.testing.assert_close(output, oracle(call), atol=tolerance, rtol=tolerance)


REFUSED = [
    *((kernel, {"row_starts": [0, 9]}, "padding") for kernel in KERNELS),
    *((kernel, {"softcap": 30.0}, "softcap") for kernel in KERNELS),
    ("sdpa", {"queries": 40}, "a chunk that follows on others"),
    ("flash2", {}, "needs a CUDA device"),
    ("cudnn", {}, "needs a CUDA device"),
    ("efficient", {}, "needs a CUDA device"),
    ("flash4", {}, "needs a Hopper GPU"),
]


@pytest.mark.parametrize("kernel, options, reason", REFUSED)
def test_what_a_kernel_cannot_serve_it_says(kernel: str, options: dict[str, object], reason: str) -> None:
    if torch.cuda.is_available() and "needs" in reason:
        pytest.skip("there is a GPU")
    call = make_call(100, **options)  # type: ignore[arg-type]
    said = why_unsupported(call, kernel)
    assert said is not None and kernel in said and reason in said
    with pytest.raises(UnsupportedCallError, match=reason):
        attend(call, kernel)


def test_no_kernel_is_faster_on_a_cpu() -> None:
    assert fastest(make_call(100)) is None


class _OnGpu:
    """A tensor that looks like one on a GPU to the choice of a kernel."""

    is_cuda, dtype, device, shape = True, torch.bfloat16, "cuda", (1, 4, 100, 128)

    def __init__(self) -> None:
        self._like = torch.empty(self.shape, dtype=self.dtype, device="meta")

    def __getattr__(self, name: str) -> Any:  # where it lies in memory
        return getattr(self._like, name)


@pytest.mark.parametrize(
    "capability, refused, expected",
    [
        ((9, 0), [], "flash4"),
        ((9, 0), ["flash4"], "cudnn"),
        ((9, 0), ["flash4", "cudnn"], None),
        ((8, 0), [], "flash2"),
        ((8, 9), ["flash2"], None),
        ((12, 0), [], None),  # not measured
    ],
)
def test_the_order_of_each_generation(
    capability: tuple[int, int], refused: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = AttentionCall(_OnGpu(), _OnGpu(), _OnGpu(), 1.0, 0, "prefill")  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "why_unsupported", lambda call, kernel: "no" if kernel in refused else None)
    assert fastest(call) == expected


def test_flash4_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    call = AttentionCall(_OnGpu(), _OnGpu(), _OnGpu(), 1.0, 0, "prefill")  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash_attn_4, "installed", lambda: False)
    assert why_unsupported(call, "flash4") == "kernel flash4 needs the package flash-attn-4"
    monkeypatch.setattr(flash_attn_4, "installed", lambda: True)
    assert why_unsupported(call, "flash4") is None
