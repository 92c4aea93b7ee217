"""Every op with every tensor in every layout: the result depends on the numbers, not on where they lie."""

from typing import Any

import pytest
import torch
from builders.attention_ops import ATTENTION, TILE
from builders.layouts import (
    DIMS,
    HAVE_DIMS,
    OPS,
    Layout,
    agree,
    expanded,
    last_first,
    made,
    odd,
    plain,
    reversed_dims,
    shifted,
    single,
    spread,
)
from builders.op import Op, Size
from builders.selection_ops import SELECTION

from sparse_patch.kernels.launch import tma_ready
from sparse_patch.ops.attention.block_sparse.triton import block_sparse_attention
from sparse_patch.ops.attention.span.triton import span_attention
from sparse_patch.ops.attention.token_blocks.triton import token_block_attention


def alone(op: Op) -> list[tuple[str, ...]]:
    """The tensors of an op, one by one; tensors that make sense only together form one entry."""
    each = [(name,) for name in op.make(Size()) if name not in op.together]
    return [*each, op.together] if op.together else each


ONE_AT_A_TIME = [
    pytest.param(name, backend, tensors, layout, id=f"{name}-{backend}-{'+'.join(tensors)}-{layout.__name__}")
    for name, op in OPS.items()
    for backend in op.backends
    for tensors in alone(op)
    for layout in ((spread,) if op.slow else (spread, expanded))
    if layout is spread or not set(tensors) & set(op.written)
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name, backend, tensors, layout", ONE_AT_A_TIME)
def test_one_tensor_anywhere(name: str, backend: str, tensors: tuple[str, ...], layout: Layout) -> None:
    agree(name, backend, Size(), dict.fromkeys(tensors, layout))


ALL_AT_ONCE = [
    pytest.param(name, backend, layout, id=f"{name}-{backend}-{layout.__name__}")
    for name, op in OPS.items()
    for backend in op.backends
    for layout in ((odd, single) if op.slow else (odd, single, shifted, last_first, reversed_dims))
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name, backend, layout", ALL_AT_ONCE)
def test_all_tensors_anywhere(name: str, backend: str, layout: Layout) -> None:
    size = Size(batch=1 if layout is single else 2)
    agree(name, backend, size, dict.fromkeys(OPS[name].make(size), layout))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", [name for name in HAVE_DIMS if name in ATTENTION])
def test_any_head_dim(name: str, dims: tuple[int, int]) -> None:
    agree(name, OPS[name].backends[0], Size(dims=dims, dtype=torch.float16), {})


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("head_dim", [20, 66, 100, 160])
@pytest.mark.parametrize("name", [name for name in HAVE_DIMS if name in SELECTION])
def test_any_head_dim_of_a_selection(name: str, head_dim: int) -> None:
    agree(name, OPS[name].backends[0], Size(dims=(head_dim, 36)), {})


def test_a_descriptor_gets_what_it_can_describe() -> None:
    """Rows of whole 16-byte steps are taken as they are; all others are copied into such rows."""
    fits = torch.randn(2, 3, 5, 24, dtype=torch.float16)
    for x in (fits, fits[:, :2, 1:4], fits.transpose(1, 2), fits[..., 8:20], expanded(fits)):
        assert tma_ready(x) is x
    for x in (fits[..., :20].contiguous(), spread(fits), last_first(fits), odd(fits), shifted(fits), single(fits[:1])):
        copied = tma_ready(x)
        assert torch.equal(copied, x) and copied.data_ptr() != x.data_ptr()
        assert copied.data_ptr() % 16 == 0 and copied.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in copied.stride()[:-1])


@pytest.mark.parametrize("layout", [plain, odd])
def test_fakes_know_the_results_of_any_layout(layout: Layout) -> None:
    """What torch.compile assumes has the shapes, dtypes and strides of what it gets."""
    size = Size(dims=(20, 12), dtype=torch.float16)
    x = made("block_sparse", size, dict.fromkeys(("q", "k", "v"), layout))
    lists = x["indices"], x["counts"], x["columns"], x["column_counts"], x["kv_start"]
    check(block_sparse_attention, x["q"], x["k"], x["v"], *lists, 0.3, 0.0, 16, 18, None, True)
    check(span_attention, x["q"], x["k"], x["v"], x["kv_start"], None, [2, 0], [9, 0, 0, 9] * 2, 0.3, 0.0, False)
    x = made("token_blocks", size, dict.fromkeys(("q", "k", "v"), layout))
    lists = x["entries"], x["counts"], x["kv_start"]
    check(token_block_attention, x["q"], x["k"], x["v"], *lists, 0.3, 0.0, 64, TILE, 1, 0, 0, 144, True)


def check(launch: Any, *arguments: object) -> None:
    torch.library.opcheck(launch.op, arguments, test_utils="test_faketensor")
