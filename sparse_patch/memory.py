"""What a decode method keeps beside the keys of a layer from one step to the next: page statistics and the like."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from sparse_patch.ordinary import OrdinaryState


@dataclass
class LayerMemory(OrdinaryState):
    """The tensors of one layer of one cache. The cache keeps them in step with its keys.

    Attributes:
        tensors: by name, each with the batch as its first dimension.
        covered: tokens that the tensors know of, where the host knows (a growing cache); 0 for none.
        corrected: tokens that cache correction need not read again, see `sparse_patch.correction`.
        at_rest: whether the running forward reads everything, because it corrects what was decoded sparsely.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    covered: int = 0
    corrected: int = 0
    at_rest: bool = False

    def clear(self) -> None:
        """Forget everything; the method starts again from the keys."""
        self.tensors.clear()
        self.covered = 0

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Reorder, repeat or select the rows of the batch."""
        self.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
