"""A stand-in for a tensor that is made only if something asks for it."""

from typing import Any

import torch
from torch.utils._pytree import tree_map


class TensorInWaiting:
    """Behaves like the tensor that `tensor` makes, if something is asked that the class itself does not have.

    Some decoders compute on their mask between making it and attending (Doge, DeepSeek-V3.2, GLM-5). They get what they
    get without the patch, and pass a tensor on.
    """

    def tensor(self) -> torch.Tensor:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # protocols of copying, pickling and printing
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch with the tensor; see `torch.overrides`."""
        return func(*tree_map(_made, args), **tree_map(_made, kwargs or {}))


def _made(value: Any) -> Any:
    return value.tensor() if isinstance(value, TensorInWaiting) else value


def _operator(name: str) -> Any:
    def operate(self: TensorInWaiting, *others: Any) -> Any:
        return getattr(self.tensor(), name)(*(_made(other) for other in others))

    operate.__name__ = name
    return operate


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
_COMPARED = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
TensorInWaiting.__hash__ = object.__hash__  # type: ignore[method-assign]
for _name in (
    *(f"__{r}{name}__" for name in _BINARY for r in ("", "r")),
    *_COMPARED,
    "__neg__",
    "__abs__",
    "__invert__",
):
    setattr(TensorInWaiting, _name, _operator(_name))
