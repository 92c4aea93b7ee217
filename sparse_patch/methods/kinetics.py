"""Kinetics: Rethinking Test-Time Scaling Laws (2025), block top-k attention.

Every layer but the first reads the first tokens, a window of the last ones, and the blocks between them whose mean
logit is highest, a choice for each KV head. The mean is over the tokens of the block and over the query heads of the
KV head, so the mean key of each block is all that has to be kept. arXiv 2506.05333; code: Infini-AI-Lab/Kinetics. As in
its accuracy code (LiteSys):

- Blocks begin after the `sink` first tokens, not at the start. The window is `window` tokens at least and grows by up
  to a block minus one token, so that whole blocks lie between.
- What is compared are logits, not probabilities.

Here `budget` counts sinks, window and blocks together (the blocks are what is left of it, in whole ones; the growth of
the window comes on top), where the code has a number of blocks beside sinks and window. Its latency code has no sinks,
64 blocks and the current one. A softcap is left out of the scores, as the mean key cannot know it. The code's other
variants (single tokens, overlapping blocks) are not here.
"""

from math import gcd
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from sparse_patch.call import AttentionCall
from sparse_patch.files.reading import MOST
from sparse_patch.methods.base.budget import BudgetedMethod, Count
from sparse_patch.methods.base.settings import Excluded, Tokens
from sparse_patch.model_shape import LayerIndex
from sparse_patch.ops.selection.page_statistics import mean_scores, page_means
from sparse_patch.plans import PagePlan


class Kinetics(BudgetedMethod):
    """Top-k blocks by their mean logit, with sinks and a window.

    Attributes:
        budget: tokens of a list: sinks, window and blocks.
        block_size: tokens of a block.
        sink: first tokens that are always read; blocks begin after them.
        window: last tokens that are always read, at least.
    """

    summary = "blocks with the highest mean logit, the first and the last tokens, in every layer"
    paper = "Kinetics, 2025, arXiv 2506.05333"
    keeps_state = True
    renamed: ClassVar[dict[str, str]] = {"sinks": "sink", "local": "window"}

    method: Literal["kinetics"] = "kinetics"
    layers: Literal["all"] | list[LayerIndex] | Excluded = Excluded(exclude=[0])
    budget: Annotated[int, Field(gt=0, le=MOST)] | None = 1024
    block_size: Literal[4, 8, 16, 32, 64] = 16
    sink: Tokens = 4
    window: Annotated[int, Field(ge=1, le=MOST)] = 64

    @property
    def fewest(self) -> int:
        return self.sink + self.window + self.block_size

    @property
    def list_page_size(self) -> int:
        """Tokens of a page of the lists: sinks and blocks are whole pages."""
        return gcd(self.sink, self.block_size)

    def pages(self, tokens: Count) -> Count:
        """Blocks that a budget leaves room for; see `BudgetedMethod.pages`."""
        return (tokens - self.sink - self.window) // self.block_size

    def statistics(self, call: AttentionCall) -> torch.Tensor:
        """The mean keys of the blocks, brought up to date; see `DecodeMethod.statistics`."""
        return page_means(call, self.block_size, self.sink)

    def choose(self, call: AttentionCall, statistics: torch.Tensor) -> PagePlan:
        """Top-k blocks of every KV head; see `DecodeMethod.choose`."""
        lengths = call.lengths()
        of_heads = mean_scores(call.q[:, :, -1], statistics, lengths, self.block_size, self.sink)
        scores = of_heads.unflatten(1, (call.k.shape[1], call.group_size)).mean(2)
        between = self.pages(lengths).clamp(min=0)  # whole blocks between sinks and window
        return self._plan_of_blocks(call, between, *self.highest(call, scores, between))

    def _plan_of_blocks(
        self, call: AttentionCall, between: torch.Tensor, blocks: torch.Tensor, counts: torch.Tensor
    ) -> PagePlan:
        """Sinks, the chosen blocks and what follows the last block before the window, as pages.

        Args:
            call: the call.
            between: blocks to choose from, int64 `[B]`.
            blocks: int32 `[B, Hkv, K]`, of which the first `counts` are chosen.
            counts: int32 `[B, Hkv]`.
        """
        page = self.list_page_size
        per_block, first = self.block_size // page, self.sink // page  # pages of a block; page of the first block
        in_blocks, between = (
            counts.long() * per_block,
            between[:, None] * per_block,
        )  # pages: of chosen and of all blocks
        size = first + blocks.shape[-1] * per_block - (-(self.window + self.block_size - 1) // page)
        slot = torch.arange(size, device=blocks.device).expand(*counts.shape, -1)
        number, within = (slot - first).clamp(min=0) // per_block, (slot - first) % per_block
        chosen = first + blocks.gather(-1, number.clamp(max=blocks.shape[-1] - 1)) * per_block + within
        window = slot + (between - in_blocks)[..., None]
        pages = torch.where(slot < first + in_blocks[..., None], torch.where(slot < first, slot, chosen), window)
        read = -(-call.lengths()[:, None] // page) - between + in_blocks
        return PagePlan.of(call, pages.clamp(max=-(-call.kv_length // page) - 1).int(), read.int(), page)
