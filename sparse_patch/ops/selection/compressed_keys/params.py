"""What a token always reads, and how many more blocks it chooses."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparse_patch.plans import listable_blocks

STRIDE = 16  # tokens from one compressed key to the next; each is the mean of twice as many
BLOCK = 64  # tokens of a block
COLUMNS = BLOCK // STRIDE  # compressed keys that begin in a block
COARSE = 4  # coarse compressed keys are this many times as long, and as far apart
COARSE_PAGES = 2 * COARSE  # pages of STRIDE tokens per coarse compressed key
LARGEST = torch.finfo(torch.float32).max  # largest possible score


@dataclass(frozen=True)
class CompressedKeysParams:
    """How many blocks a token reads; see `TokenBlockPlan` for the first three numbers.

    Attributes:
        init_blocks: first blocks.
        local_blocks: blocks before the token's own, at least 1.
        dense_blocks: first blocks whose tokens read everything before them.
        chosen: blocks that a token chooses in between, at least 1.
    """

    init_blocks: int
    local_blocks: int
    dense_blocks: int
    chosen: int

    def candidates(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last-plus-one block that tokens of `block` choose among, both like `block`."""
        return listable_blocks(block, self.init_blocks, self.local_blocks, self.dense_blocks)


def seen(tokens: torch.Tensor, number: int, factor: int = 1) -> torch.Tensor:
    """Which of the first `number` compressed keys a query sees that sees `tokens` `[...]`: bool `[..., number]`."""
    end = torch.arange(2, number + 2, device=tokens.device) * (factor * STRIDE)
    return end <= tokens[..., None]


def pooled(columns: torch.Tensor, blocks: int) -> torch.Tensor:
    """Scores of blocks `[..., blocks]` from those of compressed keys `[..., n]`, all at least 0: b has 4b-1 to 4b+3."""
    room = blocks * COLUMNS
    padded = F.pad(columns, (1, max(room - columns.shape[-1], 0)))[..., : room + 1]
    return padded.unfold(-1, COLUMNS + 1, COLUMNS).amax(-1)
