"""Triton kernels whose launches cost the host little.

Triton looks at every argument of a launch to find the compiled kernel. That takes some 40 us for 30 arguments, longer
than all the rest of a launch. A decode step launches the same kernels for every layer and token, so we remember which
compiled kernel served which kind of arguments.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

_MOST = 512  # kinds of launches that a kernel remembers
_INT32, _UINT64 = -(2**31), 2**63  # the least int32; the least number that needs an unsigned int64


def jit(do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` for kernels that the host launches. Under Triton's interpreter it is `triton.jit`."""

    def decorate(function: Callable[..., Any]) -> Any:
        made = triton.jit(function, do_not_specialize=list(do_not_specialize))
        return Kernel(made) if isinstance(made, triton.JITFunction) else made

    return decorate


class Kernel:
    """A Triton kernel that remembers what it compiled.

    Two launches are of one kind if Triton would compile the same for both: dtypes and alignment of tensors, the values
    of constants, and what Triton asks about other numbers (is it 1, a multiple of 16, how wide). Here kinds may be
    finer than Triton's, never coarser.
    """

    def __init__(self, function: Any) -> None:
        """Wrap a `triton.JITFunction`, whose constants are its last parameters."""
        self.function = function
        self._names: list[str] = [parameter.name for parameter in function.params]
        self._specialises = [not x.do_not_specialize for x in function.params if not x.is_constexpr]
        self._compiled: dict[Any, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """What launches the kernel on a grid. The constants are passed by name."""

        def launch(*args: Any, **constants: Any) -> None:
            kind = self._kind(args, constants)
            compiled = None if kind is None else self._compiled.get(kind)
            if compiled is not None:
                values = [constants[name] for name in self._names[len(args) :]]
                compiled[(*grid, 1, 1)[:3]](*args, *values)
                return
            compiled = self.function[grid](*args, **constants)
            if kind is not None:
                if len(self._compiled) >= _MOST:
                    self._compiled.clear()
                self._compiled[kind] = compiled

        return launch

    def _kind(self, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        """What a launch has in common with others of its kind; None if Triton has to look at it."""
        if len(args) != len(self._specialises):
            return None
        kinds: list[Any] = [torch.cuda.current_device()]
        for value, specialises in zip(args, self._specialises, strict=True):
            kind = type(value)
            if kind is torch.Tensor:
                kinds.append((value.dtype, value.data_ptr() % 16 == 0))
            elif kind is int:
                width = 32 if _INT32 <= value < -_INT32 else 64 if value < _UINT64 else 65
                kinds.append((width, value == 1, value % 16 == 0) if specialises else width)
            elif kind is float or kind is tuple or value is None:
                kinds.append(value)
            else:
                return None
        return (*kinds, *constants.items())
