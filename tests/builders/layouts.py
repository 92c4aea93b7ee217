"""Layouts of tensors, and what an op makes of tensors laid out in some way.

An op of the tables runs on tensors with NaN (or 0) where no number of theirs lies, and must give what it gives for
contiguous copies in the plainest backend that it has.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from builders.attention_ops import ATTENTION
from builders.op import Size, Tensors
from builders.selection_ops import SELECTION

OPS = {**ATTENTION, **SELECTION}


def gaps(x: Tensor, *shape: int) -> Tensor:
    """Room in which what is no number of the tensor shows."""
    return x.new_full(shape, torch.nan if x.is_floating_point() else 0)


def spread(x: Tensor) -> Tensor:
    """The last stride is 2."""
    room = gaps(x, *x.shape[:-1], 2 * x.shape[-1])
    room[..., ::2] = x
    return room[..., ::2]


def last_first(x: Tensor) -> Tensor:
    """The last dimension is the outermost one in memory."""
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def expanded(x: Tensor) -> Tensor:
    """All heads, or all rows if there is one head, are one in memory."""
    dim = 1 if x.ndim > 1 and x.shape[1] > 1 else 0
    return x.narrow(dim, 0, 1).expand_as(x)


def odd(x: Tensor) -> Tensor:
    """No stride but the last is a multiple of anything, and between rows lie gaps."""
    room = gaps(x, *(size + 1 + size % 2 for size in x.shape))
    view = room[tuple(slice(size) for size in x.shape)]
    return view.copy_(x)


def shifted(x: Tensor) -> Tensor:
    """Contiguous, from an address that is no multiple of 16 bytes."""
    return gaps(x, x.numel() + 1)[1:].view(x.shape).copy_(x)


def reversed_dims(x: Tensor) -> Tensor:
    """All dimensions but the last lie in memory the other way round: tokens, heads, rows."""
    order = [*range(x.ndim - 2, -1, -1), x.ndim - 1] if x.ndim > 1 else [0]
    return x.permute(order).contiguous().permute(order)


def single(x: Tensor) -> Tensor:
    """What PyTorch calls contiguous: the strides of dimensions of size 1 are odd numbers."""
    strides = [2 * x.numel() + 7 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, strides)


def plain(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


Layout = Callable[[Tensor], Tensor]


def made(name: str, size: Size, layouts: dict[str, Layout]) -> Tensors:
    """The tensors of an op, always the same numbers; those that no layout is named for are contiguous."""
    torch.manual_seed(0)
    return {key: layouts.get(key, plain)(plain(x).to(size.device)) for key, x in OPS[name].make(size).items()}


@cache
def right(name: str, size: Size, alike: tuple[str, ...]) -> tuple[Tensor, ...]:
    """What is right for contiguous tensors; the heads of some are `alike`."""
    given = made(name, size, dict.fromkeys(alike, expanded))
    results = OPS[name].run({key: plain(x) for key, x in given.items()}, OPS[name].right)
    assert any(x.any() for x in results), "nothing to see"
    return results


def agree(name: str, backend: str, size: Size, layouts: dict[str, Layout]) -> None:
    """What an op makes of tensors is what its plainest backend makes of contiguous copies."""
    alike = tuple(key for key, layout in layouts.items() if layout is expanded)
    results = OPS[name].run(made(name, size, layouts), backend)
    plainest = replace(size, device="cpu") if OPS[name].right == "torch" else size
    tolerance = OPS[name].tolerance * (1 if size.dtype == torch.float32 else 100)
    for ours, theirs in zip(results, right(name, plainest, alike), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs.cpu(), atol=tolerance, rtol=tolerance)


# Head dims of queries and keys, and of values, that fill no tile, no 16 bytes, or all that the kernels serve.
DIMS = [(20, 36), (50, 100), (66, 72), (100, 50), (160, 192), (256, 20)]
HAVE_DIMS = [name for name, op in OPS.items() if "q" in op.make(Size()) and not op.slow]
