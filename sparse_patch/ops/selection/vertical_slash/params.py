"""The rules by which lines and blocks are chosen."""

from dataclasses import dataclass

import torch

from sparse_patch.call import AttentionCall


@dataclass(frozen=True)
class VerticalSlashParams:
    """How many columns and diagonals of blocks a head takes, and when it chooses block by block instead.

    Attributes:
        gamma: attention mass to keep.
        tau: a head is query-aware if the square root of the Jensen-Shannon divergence (in nats) between its pooled
            and its true attention over key blocks is below this.
        min_blocks: minimum number of columns, and of diagonals, that a head takes; a query-aware head takes no more.
        max_blocks: maximum number of columns, and of diagonals; None if unlimited.
        reach: if true, lines are taken until their mass reaches `gamma`, each bucket of distances with both block
            diagonals that it touches. If false, there is one line for every 128 tokens that stay within `gamma`, plus
            one; distances count from the start of the prompt, and a pooled probability of 0 makes a head not
            query-aware.
        dense_length: rows of at most this many tokens take every block.
    """

    gamma: float
    tau: float
    min_blocks: int
    max_blocks: int | None
    reach: bool
    dense_length: int = 0


@dataclass(frozen=True)
class QueryAware:
    """Heads that take blocks by their pooled attention: the causal softmax of mean queries against mean keys.

    Attributes:
        heads: which heads do this, bool `[B, Hq]`.
        call: the attention call.
        mean_k: mean keys of the blocks, float32 `[B, Hkv, N, D]`.
        gamma: attention mass to keep.
        each_row: if true, every query block takes its largest blocks until their sum reaches `gamma`. If false, a head
            takes the largest blocks of all its query blocks together while their sum is at most `gamma` times the
            number of query blocks.
        max_blocks: most blocks that a query block takes, if each takes its own; None if unlimited.
    """

    heads: torch.Tensor
    call: AttentionCall
    mean_k: torch.Tensor
    gamma: float
    each_row: bool
    max_blocks: int | None
