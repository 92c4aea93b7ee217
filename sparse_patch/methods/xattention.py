"""XAttention: Block Sparse Attention with Antidiagonal Scoring (ICML 2025).

Queries and keys are cut into groups of `stride` tokens. The antidiagonal of each tile of `stride` x `stride` logits
represents the tile. A softmax over the tiles, summed over blocks, estimates the attention mass of every block, and each
query block of each head keeps the fewest key blocks that hold `threshold` of its mass. arXiv 2503.16428; code:
mit-han-lab/x-attention. The algorithm in plain PyTorch: `ops/selection/antidiagonal/torch.py`.

The paper's best figures use a threshold per head, searched for one model (Llama-3.1-8B); here one threshold serves all
heads. If the public code and the paper disagree, we follow the paper:

- Query groups lie at their true positions, also in a chunk of a chunked prefill (the code pads queries and keys
  separately, which shifts them) and in a left-padded row (they count from its first token). A chunk that begins at a
  block's edge selects what the whole prompt would; one that begins inside a block selects only for the rest of it.
- Key block 0 and the diagonal are kept in every row (in the code the first is a side effect), and count towards the
  threshold. The set is the smallest: the block that crosses the threshold is the last (the code's first rows keep one
  block more). Ties go to the earlier key block.
- A group that is not full is averaged over its real queries. The code divides zeros by `stride`, which flattens it.
- The model's own `scale` and softcap are used (the code: `D ** -0.5`, none). KV heads are not repeated.

As in the code, a tile on the diagonal counts including its future keys. It lies in the diagonal block, which is always
read. A query block's selection looks at no token after the block.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from typing_extensions import Self

from sparse_patch.call import AttentionCall
from sparse_patch.errors import FieldError
from sparse_patch.files.reading import MOST
from sparse_patch.kernels.slices import slices
from sparse_patch.methods.base.bound import Selection
from sparse_patch.methods.base.settings import PrefillMethod
from sparse_patch.ops.selection.antidiagonal import block_masses
from sparse_patch.plans import BlockGrid, Dense

_SELECTION_BYTES = 48  # temporaries per block: the sort's values and indices, twice, and what is computed from them


class XAttention(PrefillMethod):
    """Blocks by attention mass, estimated from strided antidiagonals.

    Attributes:
        threshold: estimated attention mass that every query block keeps, in (0, 1]; 1 is dense.
        stride: side in tokens of the tiles whose antidiagonal is computed; must divide `block_size`. The selection
            costs about 1/stride of dense attention; 1 is exact.
        block_size: side of a block in tokens.
    """

    summary = "blocks by attention mass, estimated from antidiagonals"
    paper = "XAttention, ICML 2025, arXiv 2503.16428"

    method: Literal["xattention"] = "xattention"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    stride: Annotated[int, Field(gt=0, le=MOST)] = 16

    @model_validator(mode="after")
    def _stride_divides_the_block(self) -> Self:
        if self.block_size % self.stride:
            raise FieldError(
                "stride", f"{self.stride} does not divide block_size {self.block_size}", "take a power of two up to it"
            )
        return self

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """See `PrefillMethod.why_dense`."""
        if self.threshold >= 1:
            return Dense("threshold: 1")
        if short := super().why_dense(call):
            return short
        if call.kv_length <= 2 * self.block_size:
            return Dense("no longer than the two blocks that are always kept")
        return None

    def select(self, call: AttentionCall, grid: BlockGrid) -> Selection:
        """Select blocks for every head and query block; see `PrefillMethod.select`."""
        batch, heads = call.q.shape[:2]
        blocks = call.q.new_zeros(batch, heads, grid.num_query_blocks, grid.num_key_blocks, dtype=torch.bool)
        for rows, masses in block_masses(call, grid, self.stride):
            visible = masses.shape[-1]
            kept, diagonal = blocks[:, :, rows, :visible], grid.query_block_ids[:, rows]
            for part in slices(masses.shape[2], _SELECTION_BYTES * batch * heads * visible):
                kept[:, :, part] = fewest_reaching(masses[:, :, part], diagonal[:, part], self.threshold)
        return Selection(blocks)


def fewest_reaching(masses: torch.Tensor, diagonal: torch.Tensor, threshold: float) -> torch.Tensor:
    """The fewest key blocks of each row that include key block 0 and the diagonal and whose masses reach a threshold.

    Args:
        masses: float32 `[B, Hq, NQ, N]`; each row sums to 1.
        diagonal: the diagonal block of each row, int64 `[B, NQ]`.
        threshold: the mass to reach.

    Returns:
        Bool `[B, Hq, NQ, N]`. Of equal masses the earlier is taken.
    """
    key_block = torch.arange(masses.shape[-1], device=masses.device)
    forced = (key_block == 0) | (key_block == diagonal[..., None])
    order = masses.masked_fill(forced[:, None], torch.inf).argsort(dim=-1, descending=True, stable=True)
    ranked = masses.gather(-1, order)
    taken = F.pad(ranked.cumsum(-1)[..., :-1], (1, 0)) < threshold  # the mass of all blocks that rank before
    return torch.zeros_like(taken).scatter_(-1, order, taken) | forced[:, None]
