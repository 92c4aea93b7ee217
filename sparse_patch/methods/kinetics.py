"""Kinetics: Rethinking Test-Time Scaling Laws (2025), block top-k attention.

Every layer but the first reads the first tokens, a window of the last ones, and the blocks between them with the
highest mean logit. Each KV head has its own choice. The mean is over the tokens of the block and over the query heads
of the KV head, so only the mean key of each block has to be kept. arXiv 2506.05333; code: Infini-AI-Lab/Kinetics. The
algorithm in plain PyTorch: `ops/selection/page_statistics/torch.py`.

As in its accuracy code (LiteSys):

- Blocks begin after the `sink` first tokens, not at the start. The window has at least `window` tokens and grows by up
  to a block minus one token, so that whole blocks lie between sinks and window.
- Logits are compared, not probabilities.

Here `budget` counts sinks, window and blocks together: the blocks get what is left of it, as whole blocks, and the
growth of the window comes on top. The code has a number of blocks in addition to sinks and window. Its latency code has
no sinks, 64 blocks and the current one. The scores have no softcap, because the mean key does not determine it. The
code's other variants (single tokens, overlapping blocks) are not implemented.
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
    """The top-k blocks by their mean logit, with sinks and a window.

    Attributes:
        budget: tokens of a list: sinks, window and blocks.
        block_size: tokens per block.
        sink: first tokens that are always read; blocks begin after them.
        window: minimum number of last tokens that are always read.
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
        """Tokens per page of the lists; sinks and blocks are whole pages."""
        return gcd(self.sink, self.block_size)

    def pages(self, tokens: Count) -> Count:
        """Number of blocks that a budget leaves room for; see `BudgetedMethod.pages`."""
        return (tokens - self.sink - self.window) // self.block_size

    def statistics(self, call: AttentionCall) -> torch.Tensor:
        """Return the mean keys of the blocks, brought up to date; see `DecodeMethod.statistics`."""
        return page_means(call, self.block_size, self.sink)

    def choose(self, call: AttentionCall, statistics: torch.Tensor) -> PagePlan:
        """Choose the top-k blocks of every KV head; see `DecodeMethod.choose`."""
        lengths = call.lengths()
        of_heads = mean_scores(call.q[:, :, -1], statistics, lengths, self.block_size, self.sink)
        scores = of_heads.unflatten(1, (call.k.shape[1], call.group_size)).mean(2)
        between = self.pages(lengths).clamp(min=0)  # whole blocks between sinks and window
        return self._plan_of_blocks(call, between, *self.highest(call, scores, between))

    def _plan_of_blocks(
        self, call: AttentionCall, between: torch.Tensor, blocks: torch.Tensor, counts: torch.Tensor
    ) -> PagePlan:
        """The sinks, the chosen blocks and everything after the last block to choose from, as pages.

        Args:
            call: the call.
            between: blocks to choose from, int64 `[B]`.
            blocks: int32 `[B, Hkv, K]`, of which the first `counts` are chosen.
            counts: int32 `[B, Hkv]`.
        """
        page, device = self.list_page_size, blocks.device
        per_block, first = self.block_size // page, self.sink // page  # pages per block; page of the first block
        in_blocks, between = counts * per_block, between[:, None] * per_block  # pages of the chosen and of all blocks
        room = blocks.shape[-1] * per_block
        within = torch.arange(first, first + per_block, device=device)
        chosen = (blocks.long()[..., None] * per_block + within).flatten(-2)
        slot = torch.arange(room - (-(self.window + self.block_size - 1) // page), device=device)
        window = slot + (first + between - in_blocks)[..., None]  # where it follows the chosen blocks
        listed = torch.where(slot[:room] < in_blocks[..., None], chosen, window[..., :room])
        sinks = torch.arange(first, device=device).expand(*counts.shape, -1)
        pages = torch.cat([sinks, listed, window[..., room:]], -1)
        read = -(-call.lengths()[:, None] // page) - between + in_blocks
        return PagePlan.of(call, pages.clamp(max=-(-call.kv_length // page) - 1).int(), read.int(), page)
