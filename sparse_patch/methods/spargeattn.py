"""SpargeAttn: Accurate and Training-free Sparse Attention Accelerating Any Model Inference (ICML 2025).

Queries and keys are cut into blocks. A block is represented by its mean if its tokens are alike, that is, if its
self-similarity is above `similarity_threshold`. The self-similarity is the mean cosine of all pairs of its tokens, for
keys after the mean key of their row, which all of them share, is subtracted ("smoothing"). A query block of a head
selects from the causal softmax of its mean query against the mean keys of such blocks. A block that is not alike is
never judged by its mean: such a key block is read by every query block after it, and such a query block reads every key
block before it. arXiv 2502.18137; code: thu-ml/SpargeAttn. The similarities in plain PyTorch:
`ops/selection/block_means/torch.py`.

There are two selections, as in the code, and both take at least one block. `topk` takes a share of the row's key
blocks; the authors recommend it. `cdf`, the paper's selection, takes the largest while their sum is at most
`cdf_threshold`; the block that crosses the threshold is not taken. The selection is the paper's first filter. The
second filter, `pv_threshold`, leaves out selected tiles whose logits turn out to lie far below the running maximum.
Products have full precision, not the paper's int8 and fp8.

The public code is followed, or not, in the following:

- `topk` counts against all key blocks of the row, not only those before the query block: a `topk` of one half computes
  three quarters of the causal triangle. In a chunk of a chunked prefill the row ends at the chunk's end.
- The diagonal is always read, in addition to what is selected (the code can miss it). With `attention_sink`, key block
  0 is always read too.
- Query and key blocks have the same size (the code: 128 queries by 64 keys, on Hopper 64 by 128). Causality is exact to
  the token (the code's wrappers leave the tile on the diagonal unmasked).
- The second filter works on tiles of 64 by 64 (the code: a block by a block). It is off by default: the code's default
  of 50 leaves out weights below 2 ** -50, and flash-attn-4's kernel, the fastest one, has no such filter.
- Means and similarities are over the real tokens of a block. The code divides zeros by zeros in the last block, which
  makes that block dense. A zero vector has a cosine of 0 with everything, including itself.
- Means are of raw keys. Smoothing moves all logits of a query by one number, which the softmax drops. With a softcap,
  which the code lacks, the number would not drop out; so the softcap is applied to the logits of the raw means.
- The model's own `scale` is used (the code: `D ** -0.5`). Sums and probabilities are float32 (the code: the model's
  dtype and float16). Ties go to the earlier key block, and KV heads are not repeated.

The mean key is that of the whole row up to the call's end. With a `similarity_threshold` of at least 0 a token's output
therefore depends a little on tokens after it. Below 0 every block counts as alike and no similarity is computed. A
query block's selection then looks at no token after the block, except that `topk` uses their number.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.slices import slices
from sparse_patch.methods.base.bound import Selection
from sparse_patch.methods.base.settings import PrefillMethod
from sparse_patch.ops.selection.block_means import (
    key_means,
    key_similarities,
    query_means,
    query_means_and_similarities,
)
from sparse_patch.ops.selection.pooling import mean_of_rows, pooled_logits
from sparse_patch.plans import BlockGrid, Dense

_SELECTION_BYTES = 48  # temporaries per block: the sort's values and indices, twice, and what is computed from them
_PUBLISHED_SIMILARITY = {"topk": -0.1, "cdf": 0.6}


class SpargeAttn(PrefillMethod):
    """Blocks by the attention of means if the tokens of a block are alike; all blocks if they are not.

    Attributes:
        selection: "topk" takes a share of the key blocks, "cdf" takes by mass; see the module's text.
        topk: share of the row's key blocks that a query block selects, in (0, 1]; 1 is dense. Only for "topk".
        cdf_threshold: pooled attention mass that the selected blocks stay within, in [0, 1]; 0 selects one block, 1 is
            dense. Only for "cdf".
        similarity_threshold: a block is represented by its mean if its self-similarity is above this. Similarities lie
            in [0, 1], so below 0 every block is, and with 1 no block is (dense). None for the published value of the
            selection: -0.1 for "topk", 0.6 for "cdf".
        pv_threshold: tiles of a query block's keys are left out if all their logits lie at least this far below what
            was read before them, in log2 units (`ops.attention.block_sparse` has the rule). None to leave out no tile.
            Densities include these tiles.
        attention_sink: whether every query block reads key block 0.
        block_size: side of a block in tokens.
    """

    summary = "blocks by the attention of means, where the tokens of a block are alike"
    paper = "SpargeAttn, ICML 2025, arXiv 2502.18137"

    method: Literal["spargeattn"] = "spargeattn"
    selection: Literal["topk", "cdf"] = "topk"
    topk: Annotated[float, Field(gt=0, le=1)] = 0.5
    cdf_threshold: Annotated[float, Field(ge=0, le=1)] = 0.98
    similarity_threshold: Annotated[float, Field(ge=-1, le=1)] | None = None
    pv_threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    attention_sink: bool = False

    @property
    def least_similarity(self) -> float:
        """`similarity_threshold`, or the published value of the selection."""
        chosen = self.similarity_threshold
        return _PUBLISHED_SIMILARITY[self.selection] if chosen is None else chosen

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """See `PrefillMethod.why_dense`."""
        if dense := self._everything():
            return dense
        if short := super().why_dense(call):
            return short
        if call.kv_length <= (1 + self.attention_sink) * self.block_size:
            return Dense("no longer than the blocks that are always kept")
        return None

    def _everything(self) -> Dense | None:
        """The dense answer if the settings take every block; else None."""
        if self.selection == "topk" and self.topk >= 1:
            return Dense("topk: 1")
        if self.selection == "cdf" and self.cdf_threshold >= 1:
            return Dense("cdf_threshold: 1")
        return Dense("similarity_threshold: 1") if self.least_similarity >= 1 else None

    def select(self, call: AttentionCall, grid: BlockGrid) -> Selection:
        """Select blocks for every head and query block; see `PrefillMethod.select`."""
        (batch, heads), mean_k = call.q.shape[:2], key_means(call.k, grid)
        mean_q, alike_q, alike_k = self._means_and_alike(call, grid, mean_k)
        blocks = call.q.new_empty(batch, heads, grid.num_query_blocks, grid.num_key_blocks, dtype=torch.bool)
        for rows in slices(grid.num_query_blocks, _SELECTION_BYTES * batch * heads * grid.num_key_blocks):
            candidates = grid.causal[:, None, rows]
            if alike_k is not None:
                candidates = candidates & alike_k[:, :, None]
            logits = pooled_logits(mean_q[:, :, rows], mean_k, call).masked_fill_(~candidates, -torch.inf)
            blocks[:, :, rows] = self._largest(logits, grid)
        if alike_q is not None and alike_k is not None:
            blocks |= ~alike_q[..., None]
            blocks |= ~alike_k[:, :, None]
        return Selection(blocks.logical_or_(self._always(grid)[:, None]), pv_threshold=self.pv_threshold)

    def _means_and_alike(
        self, call: AttentionCall, grid: BlockGrid, mean_k: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Mean queries, and which query and key blocks are alike: bool `[B, Hq, NQ]`, `[B, Hq, N]`; None if all are."""
        if self.least_similarity < 0:
            return query_means(call.q, grid), None, None
        mean_q, of_queries = query_means_and_similarities(call.q, grid)
        of_keys = key_similarities(call.k, grid, mean_of_rows(mean_k, grid.key_block_tokens))
        alike_k = (of_keys > self.least_similarity).repeat_interleave(call.group_size, 1)
        return mean_q, of_queries > self.least_similarity, alike_k

    def _largest(self, logits: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
        """The key blocks that each query block selects, from logits `[B, Hq, I, N]`; `-inf` is no candidate.

        A query block without candidates takes block 0. All its blocks are ones that are not alike, so it reads them.
        """
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        if self.selection == "cdf":
            taken = ranked.softmax(-1).cumsum(-1) <= self.cdf_threshold
        else:
            number = (grid.key_blocks_per_row.double() * self.topk).long()
            rank = torch.arange(logits.shape[-1], device=logits.device)
            taken = (rank < number[:, None]).view(len(number), 1, 1, -1).expand_as(logits).clone()
        taken[..., 0] = True
        return torch.zeros_like(taken).scatter_(-1, order, taken)

    def _always(self, grid: BlockGrid) -> torch.Tensor:
        """The blocks that every head reads, bool `[B, NQ, N]`: the diagonal and key block 0."""
        key_block = torch.arange(grid.num_key_blocks, device=grid.row_starts.device)
        always = key_block == grid.query_block_ids[..., None]
        return always | (key_block == 0) if self.attention_sink else always
