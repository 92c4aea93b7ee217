"""Layouts of tensors and head dims for which alignment matters; the interpreter of `test_layouts` cannot show them."""

from dataclasses import replace

import pytest
import torch
from builders.layouts import (
    ATTENTION,
    DIMS,
    HAVE_DIMS,
    OPS,
    SELECTION,
    Layout,
    Size,
    agree,
    expanded,
    last_first,
    odd,
    plain,
    reversed_dims,
    shifted,
    single,
    spread,
)

from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention import block_sparse, dense
from sparse_patch.plans import BlockPlan

pytestmark = pytest.mark.gpu
ON_GPU = Size(device="cuda")
KERNELS = [name for name, op in OPS.items() if "triton" in op.backends]


@pytest.mark.parametrize("layout", [spread, expanded, odd, shifted, last_first, reversed_dims, single])
@pytest.mark.parametrize("name", KERNELS)
def test_all_tensors_anywhere(name: str, layout: Layout) -> None:
    size = replace(ON_GPU, batch=1 if layout is single else 2)
    names = [key for key in OPS[name].make(Size()) if layout is not expanded or key not in OPS[name].written]
    agree(name, "triton", size, dict.fromkeys(names, layout))


@pytest.mark.parametrize("layout", [plain, odd, shifted])
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", [name for name in HAVE_DIMS if name in ATTENTION and name in KERNELS])
def test_half_precision_of_any_head_dim(name: str, dims: tuple[int, int], layout: Layout) -> None:
    names = [key for key in OPS[name].make(Size()) if key not in OPS[name].written]
    agree(name, "triton", replace(ON_GPU, dims=dims, dtype=torch.float16), dict.fromkeys(names, layout))


@pytest.mark.parametrize("head_dim", [20, 66, 100, 160])
@pytest.mark.parametrize("name", [name for name in HAVE_DIMS if name in SELECTION and name in KERNELS])
def test_selection_with_any_head_dim(name: str, head_dim: int) -> None:
    agree(name, "triton", replace(ON_GPU, dims=(head_dim, 36)), {})


def call_in(layout: Layout, head_dim: int) -> AttentionCall:
    torch.manual_seed(0)
    tensors = (torch.randn(1, 4, 512, head_dim, device="cuda").half() for _ in range(3))
    return AttentionCall(*(layout(x) for x in tensors), scale=0.1, layer=0, phase="prefill")


@pytest.mark.parametrize("layout", [plain, expanded, odd, shifted, single, reversed_dims, spread, last_first])
@pytest.mark.parametrize("head_dim", [64, 100])
@pytest.mark.parametrize("kernel", dense.KERNELS)
def test_dense_kernels_are_right_or_say_why_not(kernel: str, head_dim: int, layout: Layout) -> None:
    call = call_in(layout, head_dim)
    if reason := dense.why_unsupported(call, kernel):
        assert kernel in reason
        return
    expected, _, _ = block_sparse.attend(call, BlockPlan.every(call, 64), "reference")
    torch.testing.assert_close(dense.attend(call, kernel).out, expected, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("layout", [plain, expanded, odd, shifted, single, reversed_dims, spread, last_first])
@pytest.mark.parametrize("backend", ["flash", "triton"])
def test_block_sparse_is_right_or_says_why_not(backend: str, layout: Layout) -> None:
    call = call_in(layout, 64)
    plan = BlockPlan.every(call, 128)
    if block_sparse.why_unsupported(call, plan, backend) is not None:
        assert backend == "flash"
        return
    expected, _, _ = block_sparse.attend(call, plan, "reference")
    torch.testing.assert_close(block_sparse.attend(call, plan, backend)[0], expected, atol=4e-3, rtol=4e-3)
