"""FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference (ICLR 2025).

The last block of queries is attended exactly. Its attention, summed over columns and over diagonals, says which key
blocks ("verticals") and which block diagonals ("slashes") a head needs. A head whose pooled estimate of that attention
agrees with the true one (square root of the Jensen-Shannon divergence below `tau`) is "query-aware" and selects blocks
from pooled queries and keys for every query block instead. arXiv 2502.20766; code: bytedance/FlexPrefill.

Where paper and public code differ, `selection` says which one is followed:

- `reference`, the public code, whose published numbers are its own. It turns the number of *tokens* that reach `gamma`
  into a number of blocks by `// 128 + 1`, which does not guarantee the mass; slash buckets are aligned to the start of
  the prompt and only one block diagonal is computed for each; query-aware heads keep a prefix of one sort over all rows
  whose mass stays within `gamma`, so late rows can be starved; a zero probability makes the divergence NaN, and the
  head vertical-slash.
- `coverage`, the paper's intent: verticals, slashes and, per query block, query-aware blocks are taken until their
  pooled mass reaches `gamma`; a slash bucket holds whole block distances and brings both block diagonals it touches.

In both: the model's own `scale` and softcap are used (the code always uses `D ** -0.5`), probabilities are float32,
each row of a batch selects for itself from its first real token, and a chunk of a chunked prefill selects with its own
last queries. Selection looks at the last queries of the call, so a token's output depends on tokens after it.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from typing_extensions import Self

from sparse_patch.call import AttentionCall
from sparse_patch.methods.base import PrefillMethod, Tokens
from sparse_patch.ops.pooling import mean_keys, pooled_attention, pooled_logits
from sparse_patch.ops.profiles import last_query_profiles
from sparse_patch.plans import BlockGrid, BlockPlan, Dense, Plan

_REFERENCE_TOKENS_PER_BLOCK = 128  # the public code divides by this whatever its block size


class FlexPrefill(PrefillMethod):
    """Vertical-slash and query-aware block selection.

    Attributes:
        gamma: attention mass to keep, in (0, 1]; 1 is dense.
        tau: a head is query-aware when the square root of the Jensen-Shannon divergence (in nats, at most 0.83) between
            its pooled and its true block attention is below this; 0 makes no head query-aware.
        min_budget: tokens that every head keeps at least, as verticals and again as slashes.
        max_budget: tokens that verticals and slashes keep at most, each; None for no limit.
        block_size: side of a block in tokens.
        selection: "reference" follows the public code, "coverage" the paper; see the module's text.
    """

    summary = "vertical-slash or query-aware blocks, per head, by attention mass"
    paper = "FlexPrefill, ICLR 2025, arXiv 2502.20766"

    method: Literal["flexprefill"] = "flexprefill"
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.95
    tau: Annotated[float, Field(ge=0, le=1)] = 0.1
    min_budget: Tokens = 1024
    max_budget: Annotated[int, Field(gt=0)] | None = None
    block_size: Literal[16, 32, 64, 128] = 128
    selection: Literal["reference", "coverage"] = "reference"

    @model_validator(mode="after")
    def _budgets_agree(self) -> Self:
        if self.max_budget is not None and self.max_budget < self.min_budget:
            raise ValueError(
                f"max_budget: {self.max_budget} is below min_budget {self.min_budget}; raise it or lower that"
            )
        return self

    @property
    def min_blocks(self) -> int:
        return max(1, -(-self.min_budget // self.block_size))

    @property
    def max_blocks(self) -> int | None:
        return None if self.max_budget is None else -(-self.max_budget // self.block_size)

    @property
    def dense_length(self) -> int:
        """Rows of at most this many tokens are dense: the public code's own switch, and `min_length`."""
        return max(2 * self.block_size, self.min_blocks * self.block_size, self.min_length - 1)

    def plan(self, call: AttentionCall) -> Plan:
        """Select blocks for every head and query block; see `Method.plan`."""
        if self.gamma >= 1:
            return Dense("gamma: 1")
        if short := self.why_dense(call):
            return short
        if call.kv_length <= self.dense_length:
            return Dense(f"no longer than the {self.dense_length} tokens that are always kept")
        if call.q.shape[2] <= self.block_size:
            return Dense("no more queries than the selection itself attends to")
        grid = BlockGrid.of(call, self.block_size)
        blocks = self._select(call, grid)
        short_rows = grid.lengths <= self.dense_length
        return BlockPlan.from_blocks(blocks | short_rows[:, None, None, None], grid)

    def _select(self, call: AttentionCall, grid: BlockGrid) -> torch.Tensor:
        """The blocks of every head, bool `[B, Hq, NQ, N]`; may hold blocks outside the causal triangle."""
        reference = self.selection == "reference"
        by_key, by_distance = last_query_profiles(call, self.block_size)
        key_mass = _pool(by_key, grid, grid.row_starts)
        # The public code aligns distances to the start of the prompt: what the tail block lacks shifts them.
        distance_mass = _pool(by_distance, grid, -grid.tail if reference else torch.zeros_like(grid.tail))
        pooled_k = mean_keys(call, grid)
        estimate = _estimate_last_block(call, grid, pooled_k)
        distance = _js_distance(estimate, key_mass, grid.has_key_block[:, None], zero_is_nan=reference)
        query_aware = distance < self.tau
        verticals = self._choose(key_mass, by_key, query_aware, grid)
        slashes = self._choose(distance_mass, by_distance, query_aware, grid)
        if not reference:
            slashes = slashes | F.pad(slashes, (1, -1))  # a bucket of distances touches two block diagonals
        aware_blocks = self._query_aware_blocks(pooled_attention(call, grid, pooled_k), grid)
        return verticals[:, :, None] | grid.on_diagonals(slashes) | (aware_blocks & query_aware[..., None, None])

    def _choose(
        self, mass: torch.Tensor, token_mass: torch.Tensor, query_aware: torch.Tensor, grid: BlockGrid
    ) -> torch.Tensor:
        """The verticals or slashes to take, bool `[B, Hq, N]`, from their `mass` `[B, Hq, N]`; number 0 always is.

        Ties go to the lower number: the earlier key block, the nearer diagonal.
        """
        ranked = mass.masked_fill(~grid.has_key_block[:, None], -1.0)
        ranked[..., 0] = torch.inf
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        if self.selection == "reference":
            wanted = _tokens_within(token_mass, self.gamma) // _REFERENCE_TOKENS_PER_BLOCK + 1
        else:
            wanted = _number_reaching(mass.gather(-1, order), self.gamma)
        wanted = wanted.masked_fill(query_aware, self.min_blocks).clamp(self.min_blocks, self.max_blocks)
        wanted = torch.minimum(wanted, grid.key_blocks_per_row[:, None])
        taken = torch.arange(mass.shape[-1], device=mass.device) < wanted[..., None]
        return torch.zeros_like(taken).scatter(-1, order, taken)

    def _query_aware_blocks(self, attention: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
        """The blocks that a query-aware head takes from its pooled attention `[B, Hq, NQ, N]`, bool of that shape."""
        shape = attention.shape
        if self.selection == "reference":  # one sort over all rows of the head
            attention = attention.flatten(-2)
            quota = self.gamma * grid.causal.any(-1).sum(-1)[:, None, None]
        sorted_attention, order = attention.sort(dim=-1, descending=True, stable=True)
        reached = sorted_attention.cumsum(-1)
        if self.selection == "reference":
            taken = reached <= quota
        else:
            taken = reached - sorted_attention < self.gamma
            if self.max_blocks is not None:
                taken[..., self.max_blocks :] = False
        return torch.zeros_like(taken).scatter(-1, order, taken).view(shape)


def _estimate_last_block(call: AttentionCall, grid: BlockGrid, pooled_k: torch.Tensor) -> torch.Tensor:
    """Attention over key blocks of the mean of the last `block` queries, float32 `[B, Hq, N]`."""
    mean_q = call.q[:, :, -grid.block_size :].float().mean(-2, keepdim=True)
    logits = pooled_logits(mean_q, pooled_k, call).squeeze(-2)
    return logits.masked_fill(~grid.has_key_block[:, None], -torch.inf).softmax(-1)


def _js_distance(p: torch.Tensor, q: torch.Tensor, exists: torch.Tensor, zero_is_nan: bool) -> torch.Tensor:
    """Square root of the Jensen-Shannon divergence over the last axis where `exists`, in nats.

    With `zero_is_nan`, a zero probability gives NaN (0 * log 0), which is below no threshold, as in the public code.
    """
    middle = (p + q) / 2
    if zero_is_nan:
        terms = p * (p / middle).log() + q * (q / middle).log()
    else:
        middle = middle.clamp(min=torch.finfo(middle.dtype).tiny)
        terms = torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)
    return (terms.masked_fill(~exists, 0.0).sum(-1) / 2).clamp(min=0).sqrt()


def _tokens_within(mass: torch.Tensor, gamma: float) -> torch.Tensor:
    """1 + how many of the largest entries have a sum of at most `gamma`, int64 `[...]`."""
    return (mass.sort(-1, descending=True).values.cumsum(-1) <= gamma).sum(-1) + 1


def _number_reaching(ranked: torch.Tensor, gamma: float) -> torch.Tensor:
    """How many leading entries it takes until their sum is at least `gamma`, int64 `[...]`."""
    return (ranked.cumsum(-1) - ranked < gamma).sum(-1)


def _pool(profile: torch.Tensor, grid: BlockGrid, offset: torch.Tensor) -> torch.Tensor:
    """Sums of `profile` `[B, Hq, n]` over blocks that begin at entry `offset[b]`, 0 outside: `[B, Hq, N]`."""
    index = torch.arange(grid.num_key_blocks * grid.block_size, device=profile.device) + offset[:, None]
    inside = (index >= 0) & (index < profile.shape[-1])
    index = index.clamp(0, profile.shape[-1] - 1)[:, None].expand(-1, profile.shape[1], -1)
    taken = profile.gather(-1, index).masked_fill(~inside[:, None], 0.0)
    return taken.unflatten(-1, (grid.num_key_blocks, grid.block_size)).sum(-1)
