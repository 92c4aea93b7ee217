"""Part of a prompt, and the blocks that its tokens choose among."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_patch.ops.selection.compressed_keys.params import BLOCK


@dataclass(frozen=True)
class Part:
    """Query blocks of every row that go through the kernels together, and what all kernels have to know.

    Attributes:
        first: number of the first of them, within the call.
        size: how many they are.
        starts: `kv_start`; not read if `has_start` is False.
        has_start: whether any row has padding.
        q_start: as in `AttentionCall`.
        q_length: as in `AttentionCall`.
        heads: KV heads of a row.
        lists: KV heads of all rows.
        width: scores that there is room for, of a token.
        always: `init_blocks`, `local_blocks` and `dense_blocks` of a `CompressedKeysParams`.
    """

    first: int
    size: int
    starts: torch.Tensor
    has_start: bool
    q_start: int
    q_length: int
    heads: int
    lists: int
    width: int
    always: tuple[int, int, int]

    def grid(self, tokens: int) -> tuple[int, int]:
        """Programs of a kernel that takes so many tokens each."""
        return self.size * (BLOCK // tokens), self.lists

    @property
    def place(self) -> tuple[torch.Tensor, int, int, int]:
        """Where its tokens stand, as every kernel takes it."""
        return self.starts, self.q_start, self.q_length, self.first


@triton.jit
def candidates(block, init, local, dense):
    """The blocks that a token of a block chooses among: from and up to."""
    low = tl.where(block < dense, 0, tl.maximum(block - local, 0))
    return tl.minimum(init, low), low
