"""The sizes of what a framed list holds."""

from dataclasses import dataclass
from math import gcd


@dataclass(frozen=True)
class Frame:
    """Whole blocks lie between the sinks and a window, which takes the tokens that no block has.

    Attributes:
        sink: first tokens that are always read.
        block_size: tokens per block.
        window: fewest last tokens that are always read.
    """

    sink: int
    block_size: int
    window: int

    @property
    def page_size(self) -> int:
        """Tokens per page of the lists; sinks and blocks are whole pages."""
        return gcd(self.sink, self.block_size)

    @property
    def per_block(self) -> int:
        """Pages per block."""
        return self.block_size // self.page_size

    @property
    def first(self) -> int:
        """The first block's page."""
        return self.sink // self.page_size

    @property
    def spared(self) -> int:
        """The blocks of a row of n tokens are `ceil((n - spared) / block_size)`: those before the window."""
        return self.sink + self.window + self.block_size - 1

    def size(self, blocks: int) -> int:
        """The most pages of a list of `blocks` blocks."""
        return self.first + blocks * self.per_block - (-(self.window + self.block_size - 1) // self.page_size)
