"""Which heads of a layer a process has, where tensor parallelism splits them over several."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


@dataclass(frozen=True)
class HeadShard:
    """The `rank`-th of `size` equal parts of a layer's heads, query heads and KV heads alike, in their order.

    All processes of the mesh see the same tokens, so they take the same way through the code and meet in `highest` and
    `lowest`.

    Attributes:
        rank: number of the part.
        size: parts.
        mesh: the processes that have the parts, in one dimension; None where one has all heads.
    """

    rank: int = 0
    size: int = 1
    mesh: "DeviceMesh | None" = None

    @classmethod
    def of(cls, mesh: "DeviceMesh | None", size: int | None) -> "HeadShard":
        """The part of this process.

        Args:
            mesh: the processes that a model is split over, in a dimension "tp" if there are several; None for one.
            size: parts that tensor parallelism splits it into; None for one.
        """
        if mesh is None or size is None or size == 1:
            return ALL_HEADS
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh  # with other kinds of parallelism in it
        return cls(mesh.get_local_rank(), size, mesh)

    def of_layer(self, here: int, in_all: int) -> "HeadShard":
        """The part that `here` heads are of a layer's `in_all`; some models (Phi-3) have all of them on every rank."""
        return ALL_HEADS if here == in_all else self

    def part(self, values: tuple[T, ...]) -> tuple[T, ...]:
        """Of a value for each head of the layer, those of the heads that are here."""
        heads = len(values) // self.size
        return values[self.rank * heads : (self.rank + 1) * heads]

    def highest(self, x: torch.Tensor) -> torch.Tensor:
        """The largest value that any process has of each element; `x` itself, changed."""
        if self.mesh is not None:
            torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.MAX, group=self.mesh.get_group())
        return x

    def lowest(self, x: torch.Tensor) -> torch.Tensor:
        """The smallest value that any process has of each element; `x` itself, changed."""
        if self.mesh is not None:
            torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.MIN, group=self.mesh.get_group())
        return x


ALL_HEADS = HeadShard()
