"""Which heads of a layer a process has, if tensor parallelism splits them over several processes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


@dataclass(frozen=True)
class HeadShard:
    """The `rank`-th of `size` equal parts of a layer's heads, query heads and KV heads alike, in their order.

    All processes of the mesh see the same tokens, so they take the same path through the code and meet in `highest`.

    Attributes:
        rank: index of the part.
        size: number of parts.
        mesh: the processes that have the parts, in one dimension; None if one process has all heads.
    """

    rank: int = 0
    size: int = 1
    mesh: "DeviceMesh | None" = None

    @classmethod
    def of(cls, mesh: "DeviceMesh | None", size: int | None) -> "HeadShard":
        """The part of this process.

        Args:
            mesh: the processes that a model is split over, in the dimension "tp" if there are several dimensions; None
                for one process.
            size: number of parts that tensor parallelism splits the model into; None for one part.
        """
        if mesh is None or size is None or size == 1:
            return ALL_HEADS
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh  # the mesh may have other kinds of parallelism
        return cls(mesh.get_local_rank(), size, mesh)

    def of_layer(self, here: int, in_all: int) -> "HeadShard":
        """The part of a layer with `here` of `in_all` heads on this rank; Phi-3 and others have all on every rank."""
        return ALL_HEADS if here == in_all else self

    def part(self, values: tuple[T, ...]) -> tuple[T, ...]:
        """The values of this part's heads, from one value for each head of the layer."""
        heads = len(values) // self.size
        return values[self.rank * heads : (self.rank + 1) * heads]

    def highest(self, x: torch.Tensor) -> torch.Tensor:
        """The elementwise maximum over the processes, in place; returns `x`."""
        if self.mesh is not None:
            torch.distributed.all_reduce(x, op=torch.distributed.ReduceOp.MAX, group=self.mesh.get_group())
        return x


ALL_HEADS = HeadShard()
