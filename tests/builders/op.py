"""An op in a table: the tensors that it is given, and how it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_patch.call import AttentionCall

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """What tensors are made in.

    Attributes:
        batch: rows; of two, the second has 3 tokens of padding.
        dims: head dim of queries and keys, and of values.
        dtype: of queries, keys and values.
        device: where the op runs; what is right is computed on the CPU.
    """

    batch: int = 2
    dims: tuple[int, int] = (16, 8)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def rand(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.dtype)

    def call(self, length: int, queries: int, heads: tuple[int, int] = (2, 2)) -> Tensors:
        """The tensors of a call."""
        head_dim, value_dim = self.dims
        return {
            "q": self.rand(self.batch, heads[0], queries, head_dim),
            "k": self.rand(self.batch, heads[1], length, head_dim),
            "v": self.rand(self.batch, heads[1], length, value_dim),
            "kv_start": torch.tensor([0, 3])[-self.batch :],
        }


@dataclass(frozen=True)
class Op:
    """An op in the table.

    Attributes:
        make: its tensors.
        run: its results with a backend.
        backends: those that are tried, and the one whose results are right.
        together: names of tensors of which none makes sense without the others.
        written: names of those that it writes, which cannot be expanded.
        tolerance: of results with float32 tensors; with float16 a hundred times as much.
        slow: whether it takes Triton's interpreter a second, so that fewer layouts are tried.
    """

    make: Callable[[Size], Tensors]
    run: Callable[[Tensors, str], tuple[Tensor, ...]]
    backends: tuple[str, ...] = ("triton", "torch")
    right: str = "torch"
    together: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    tolerance: float = 2e-5
    slow: bool = False


def as_call(x: Tensors) -> AttentionCall:
    missing = x["q"]  # of ops that read no values, or no keys
    k = x.get("k", missing)
    q_start = k.shape[2] - x["q"].shape[2]
    return AttentionCall(x["q"], k, x.get("v", k), x["q"].shape[-1] ** -0.5, 0, "prefill", q_start, x.get("kv_start"))


def without(x: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in x.items() if name not in names}


def either(backend: str, triton: Any, torch: Any) -> Any:
    return triton if backend == "triton" else torch
