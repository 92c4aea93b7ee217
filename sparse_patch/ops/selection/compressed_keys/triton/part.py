"""A part of a prompt, and the blocks that its tokens choose among."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparse_patch.ops.selection.compressed_keys.params import BLOCK


@dataclass(frozen=True)
class Part:
    """The query blocks of every row that go through the kernels together, and what all kernels need to know.

    Attributes:
        first: index of the first query block, within the call.
        size: number of query blocks.
        starts: `kv_start`; not read if `has_start` is False.
        has_start: whether any row has padding.
        q_start: as in `AttentionCall`.
        q_length: as in `AttentionCall`.
        heads: KV heads of a row.
        lists: KV heads of all rows.
        width: room for scores, per token.
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
        """The launch grid of a kernel whose programs take `tokens` tokens each."""
        return self.size * (BLOCK // tokens), self.lists

    @property
    def place(self) -> tuple[torch.Tensor, int, int, int]:
        """The place of its tokens, in the form that every kernel takes."""
        return self.starts, self.q_start, self.q_length, self.first


@triton.jit
def candidates(block, init, local, dense):
    """First and last-plus-one block that a token of a block chooses among."""
    low = tl.where(block < dense, 0, tl.maximum(block - local, 0))
    return tl.minimum(init, low), low
