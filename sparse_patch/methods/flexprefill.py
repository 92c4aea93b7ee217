"""FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference (ICLR 2025).

The last block of queries is attended exactly. Its attention, summed over columns and over diagonals, says which key
blocks ("verticals") and which block diagonals ("slashes") a head needs. A head is "query-aware" if its pooled estimate
of that attention agrees with the true one (square root of the Jensen-Shannon divergence below `tau`). A query-aware
head instead selects blocks from pooled queries and keys, for every query block. arXiv 2502.20766; code:
bytedance/FlexPrefill. The algorithm in plain PyTorch: `ops/selection/vertical_slash/torch.py`.

Paper and public code differ; `selection` says which one is followed:

- `coverage` follows the paper's intent and is the default. Verticals, slashes and, per query block, query-aware blocks
  are taken until their pooled mass reaches `gamma`. A slash bucket holds whole block distances and brings both block
  diagonals that it touches. Because the mass is really reached, the defaults ask for less of it than the paper does.
- `reference` follows the public code. The published figures are its figures, with gamma 0.95 and a min_budget of 1024.
  It turns the number of *tokens* that reach `gamma` into a number of blocks by `// 128 + 1`, which does not guarantee
  the mass. Slash buckets are aligned to the start of the prompt, and only one block diagonal is computed for each.
  Query-aware heads keep a prefix of one sort over all rows whose mass stays within `gamma`, so late rows can be
  starved. A zero probability makes the divergence NaN, and the head becomes vertical-slash.

In both, the model's own `scale` and softcap are used (the code always uses `D ** -0.5`) and probabilities are float32.
Each row of a batch selects for itself from its first real token, and a chunk of a chunked prefill selects with its own
last queries. Selection looks at the last queries of the call, so a token's output depends on tokens after it.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from sparse_patch.call import AttentionCall
from sparse_patch.errors import FieldError
from sparse_patch.files.reading import MOST
from sparse_patch.methods.base.settings import PrefillMethod, Tokens
from sparse_patch.ops.selection.block_means import key_means
from sparse_patch.ops.selection.vertical_slash import (
    QueryAware,
    VerticalSlashParams,
    choose_vertical_slash,
    plan_of_vertical_slash,
)
from sparse_patch.plans import BlockGrid, BlockPlan, Dense


class FlexPrefill(PrefillMethod):
    """Vertical-slash and query-aware block selection.

    Attributes:
        gamma: attention mass to keep, in (0, 1]; 1 is dense.
        tau: a head is query-aware if the square root of the Jensen-Shannon divergence (in nats, at most 0.83) between
            its pooled and its true block attention is below this; 0 makes no head query-aware.
        min_budget: minimum number of tokens that every head keeps as verticals, and again as slashes.
        max_budget: maximum number of tokens for the verticals, and again for the slashes; None if unlimited.
        block_size: side of a block in tokens.
        selection: "coverage" follows the paper, "reference" the public code; see the module's text.
    """

    summary = "vertical-slash or query-aware blocks, per head, by attention mass"
    paper = "FlexPrefill, ICLR 2025, arXiv 2502.20766"

    method: Literal["flexprefill"] = "flexprefill"
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.8
    tau: Annotated[float, Field(ge=0, le=1)] = 0.1
    min_budget: Tokens = 512
    max_budget: Annotated[int, Field(gt=0, le=MOST)] | None = None
    selection: Literal["coverage", "reference"] = "coverage"

    @model_validator(mode="after")
    def _budgets_agree(self) -> Self:
        if self.max_budget is not None and self.max_budget < self.min_budget:
            raise FieldError(
                "max_budget", f"{self.max_budget} is below min_budget {self.min_budget}", "raise it or lower that"
            )
        return self

    @property
    def min_blocks(self) -> int:
        return max(1, -(-self.min_budget // self.block_size))

    @property
    def max_blocks(self) -> int | None:
        return None if self.max_budget is None else -(-self.max_budget // self.block_size)

    def dense_tokens(self, call: AttentionCall) -> int:
        """Rows of at most this many tokens are dense, by the public code's own switch and by `min_length`."""
        return max(2 * self.block_size, self.min_blocks * self.block_size, self.min_length - 1)

    def why_dense(self, call: AttentionCall) -> Dense | None:
        """See `PrefillMethod.why_dense`."""
        if self.gamma >= 1:
            return Dense("gamma: 1")
        if short := super().why_dense(call):
            return short
        if call.kv_length <= self.dense_tokens(call):
            return Dense(f"no longer than the {self.dense_tokens(call)} tokens that are always kept")
        if call.q.shape[2] <= self.block_size:
            return Dense("no more queries than the selection itself attends to")
        return None

    def select(self, call: AttentionCall, grid: BlockGrid) -> BlockPlan:
        """Select blocks for every head and query block; see `PrefillMethod.select`."""
        reach = self.selection == "coverage"
        params = VerticalSlashParams(
            gamma=self.gamma,
            tau=self.tau,
            min_blocks=self.min_blocks,
            max_blocks=self.max_blocks,
            reach=reach,
            dense_length=self.dense_tokens(call),
        )
        mean_k = key_means(call.k, grid)
        verticals, slashes, heads = choose_vertical_slash(call, grid, mean_k, params)
        aware = QueryAware(heads, call, mean_k, self.gamma, each_row=reach, max_blocks=self.max_blocks)
        return plan_of_vertical_slash(verticals, slashes, aware if self.tau > 0 else None, grid)
