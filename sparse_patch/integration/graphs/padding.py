"""The padding of the rows in a cache, for all steps until the mask says otherwise."""

from dataclasses import dataclass

import torch

from sparse_patch.integration.step import NotAStep
from sparse_patch.kernels.inference_mode import ordinary_tensors


@dataclass(frozen=True)
class Padding:
    """The padding of a cache's rows.

    Attributes:
        starts: first real token of each row, on the host.
        row_starts: the same, int64 `[B]` on the device; None if no row is padded.
        mask: bool `[B, capacity]`, true from the first real token on; None if no row is padded.
        expected: the same in the dtype of the mask that the model is given; None if it is given none.
    """

    starts: tuple[int, ...]
    row_starts: torch.Tensor | None
    mask: torch.Tensor | None
    expected: torch.Tensor | None

    @classmethod
    def of(cls, mask: torch.Tensor | None, ids: torch.Tensor, length: int, capacity: int) -> "Padding":
        """Read the padding from the device.

        Raises:
            NotAStep: padding is not only on the left.
        """
        if mask is None:
            return cls((0,) * len(ids), None, None, None)
        if mask.shape != (len(ids), length + 1):
            raise NotAStep("a padding mask of another size than the cache")
        tokens = mask.cpu() != 0
        first, place = tokens.to(torch.uint8).argmax(-1), torch.arange(capacity)
        real = place >= first[:, None]
        if not torch.equal(tokens, real[:, : length + 1]):
            raise NotAStep("padding that is not on the left")
        starts = tuple(first.tolist())
        with ordinary_tensors():
            on_device = real.to(mask.device)
            expected = on_device.to(mask.dtype)
            if not any(starts):
                return cls(starts, None, None, expected)
            return cls(starts, first.to(mask.device), on_device, expected)

    def holds(self, mask: torch.Tensor | None, ids: torch.Tensor, length: int, capacity: int) -> bool:
        """Whether a step with this mask has this padding; the host waits for the device if there is a mask."""
        if len(self.starts) != len(ids) or (mask is None) != (self.expected is None):
            return False
        if mask is None or self.expected is None:
            return True
        seen = self.expected[:, : length + 1]
        same = mask.dtype == seen.dtype and mask.shape == seen.shape and self.expected.shape[1] == capacity
        return same and torch.equal(mask, seen)
