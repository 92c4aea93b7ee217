"""A-shape: the first tokens and a window of the last ones, StreamingLLM's pattern, here for prefill.

A query reads the first `sink` keys and the keys less than `window` tokens back. The pattern is from Xiao et al.,
"Efficient Streaming Language Models with Attention Sinks", ICLR 2024, arXiv 2309.17453. As a prefill pattern, with and
without dense last queries ("tri-shape"), it is in microsoft/MInference. Positions are the true ones; StreamingLLM's
renumbering inside its cache is not done. The selection does not look at the data, so a token's output depends on no
token after it (with `last: 0`).

The public code decides per token. This implementation computes the whole blocks that these tokens touch, so it never
reads fewer keys. The public code caps the number of dense queries at n - 1; here a call that has only such queries is
simply dense.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from sparse_patch.call import AttentionCall
from sparse_patch.files.reading import MOST
from sparse_patch.methods.base.bound import Selection
from sparse_patch.methods.base.settings import PrefillMethod, Tokens
from sparse_patch.plans import BlockGrid, Dense


class AShape(PrefillMethod):
    """A sink and a window, the same for every head and query.

    Attributes:
        sink: first tokens of each row that every query reads.
        window: last keys that a query reads, including its own; 1 is only its own.
        last: number of last queries in a call that read everything, as in tri-shape; 0 for none. In a chunked prefill
            every chunk has its own.
        block_size: side of a block in tokens; sink and window are rounded up to whole blocks.
    """

    summary = "first tokens and a window, whatever the prompt says"
    paper = "StreamingLLM, ICLR 2024, arXiv 2309.17453"

    method: Literal["a_shape"] = "a_shape"
    sink: Tokens = 1024
    window: Annotated[int, Field(ge=1, le=MOST)] = 4096
    last: Tokens = 0

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """See `PrefillMethod.why_dense`."""
        if short := super().why_dense(call):
            return short
        if call.kv_length <= self.sink + self.window:
            return Dense(f"no longer than sink and window, {self.sink + self.window} tokens")
        if call.q.shape[2] <= self.last:
            return Dense(f"no more queries than last: {self.last}")
        return None

    def dense_tokens(self, call: AttentionCall) -> int:
        """See `PrefillMethod.dense_tokens`."""
        return max(self.min_length - 1, self.sink + self.window)

    def select(self, call: AttentionCall, grid: BlockGrid) -> Selection:
        """Select the same blocks for every head; see `PrefillMethod.select`."""
        sink, window = (torch.full((1,), size, device=call.q.device) for size in (self.sink, self.window))
        blocks = a_shape_blocks(grid, sink, window)
        if self.last:
            _, end = grid.query_bounds
            blocks = blocks | (end > (grid.lengths - self.last)[:, None])[:, None, :, None]
        return Selection(blocks.expand(-1, call.q.shape[1], -1, -1))


def a_shape_blocks(grid: BlockGrid, sink: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Blocks that hold a key below `sink`, or a key less than `window` tokens back from a query of the query block.

    Args:
        grid: the grid.
        sink: tokens per head, int64 `[Hq]`.
        window: tokens per head, int64 `[Hq]`; the diagonal block is always taken.

    Returns:
        bool `[B, Hq, NQ, N]`; may hold blocks above the diagonal.
    """
    size = grid.block_size
    key_block = torch.arange(grid.num_key_blocks, device=sink.device)
    distance = (grid.query_block_ids[..., None] - key_block)[:, None]
    sink_blocks = (sink + size - 1) // size
    # The first query of a block reaches furthest back, window - 1 tokens from the block's own first key.
    window_blocks = (window + size - 2) // size
    return (key_block < sink_blocks[:, None, None]) | (distance <= window_blocks[:, None, None])
