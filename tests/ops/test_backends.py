"""Which tensors the Triton kernels run on, and what each op does with all other tensors."""

import sys
from types import SimpleNamespace

import pytest
import torch
from bound import bound
from calls import make_call

from sparse_patch.errors import UnsupportedCallError
from sparse_patch.kernels import availability
from sparse_patch.methods.base.settings import PrefillMethod
from sparse_patch.methods.flexprefill import FlexPrefill
from sparse_patch.methods.minference import MInference
from sparse_patch.methods.xattention import XAttention
from sparse_patch.ops import backends
from sparse_patch.ops.attention.block_sparse import attend, why_unsupported
from sparse_patch.ops.selection.antidiagonal import block_masses
from sparse_patch.plans import BlockGrid, BlockPlan


class _OnGpu:
    """A tensor that looks like one on a GPU to the choice of a backend."""

    is_cuda, device = True, "cuda"


@pytest.mark.parametrize("major, runs", [(7, False), (8, True), (9, True)])
def test_gpus_from_ampere_on(major: int, runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(availability, "_is_recent_once", availability._is_recent)
    assert backends.prefers_triton(_OnGpu()) == runs  # type: ignore[arg-type]
    assert (backends.why_no_triton(_OnGpu()) is None) == runs  # type: ignore[arg-type]


def test_a_cpu_has_the_interpreter_but_no_op_takes_it_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert backends.why_no_triton(torch.zeros(1)) is None
    assert not backends.prefers_triton(torch.zeros(1))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert backends.why_no_triton(torch.zeros(1)) == "backend triton needs a CUDA device"


def test_ops_that_are_asked_for_triton_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "_HAS_TRITON", False)
    assert not backends.prefers_triton(_OnGpu())  # type: ignore[arg-type]
    call = make_call(40)
    grid = BlockGrid.of(call, 16)
    plan = BlockPlan.from_blocks(torch.ones(1, 4, 3, 3, dtype=torch.bool), grid)
    missing = "backend triton needs the package triton"
    assert why_unsupported(call, plan, "triton") == missing
    with pytest.raises(UnsupportedCallError, match=missing):
        attend(call, plan, "triton")
    with pytest.raises(UnsupportedCallError, match=missing):
        block_masses(call, grid, 4, "triton")
    assert [masses.shape for _, masses in block_masses(call, grid, 4)] == [(1, 4, 3, 3)]


@pytest.mark.parametrize(
    "method", [FlexPrefill(min_length=0), MInference(min_length=0, vertical=40, slash=104), XAttention(min_length=0)]
)
def test_wide_heads_are_selected_for_by_torch(method: PrefillMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, whole queries and keys of 512 dimensions do not fit in the shared memory that the kernels need."""
    call = make_call(700, head_dim=512)
    expected = bound(method).plan(call)
    monkeypatch.setattr(backends, "prefers_triton", lambda _: True)
    for op in ("antidiagonal", "vertical_slash", "last_queries"):
        monkeypatch.setitem(sys.modules, f"sparse_patch.ops.selection.{op}.triton", None)  # importing it raises
    plan = bound(method).plan(call)
    assert isinstance(expected, BlockPlan) and isinstance(plan, BlockPlan)
    assert torch.equal(plan.mask(), expected.mask())
    with pytest.raises(ImportError):
        bound(method).plan(make_call(700, head_dim=64))
