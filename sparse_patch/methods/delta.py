"""DELTA: Dynamic Layer-Aware Token Attention for Efficient Long-Context Reasoning (ACL 2026 Findings).

A few layers ("Delta layers", here the selecting ones) read everything and choose pages of 16 tokens. The layers after
them read those pages, until the next Delta layer; all heads read the same pages. A token's score is the highest softmax
probability that any query head gives it. A page's score is the sum over its tokens. The last pages are always read. The
choice is made anew for every token. arXiv 2510.09883; code: hoenza/DELTA. The algorithm in plain PyTorch:
`ops/selection/page_scores/torch.py`.

Paper, code and this implementation differ as follows:

- `budget` is in tokens, rounded up to whole pages. It includes the last pages and the page of the current token. Both
  published scripts have 64 pages (1024 tokens); the default of the code's own argument is 1024 pages.
- The code lowers a page's score by 1e-7 times its number, so that ties fall to earlier pages. At 32k tokens this
  outweighs the scores of many pages. `position_bias: 1e-7` does the same; here ties fall to earlier pages anyway.
- The code chooses as soon as one row of the batch has more pages than the budget; so does this implementation. Rows
  that have fewer pages read all of theirs.
- No sinks are forced.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field

from sparse_patch.artefacts.layer_roles import Roles
from sparse_patch.call import AttentionCall
from sparse_patch.files.reading import MOST
from sparse_patch.methods.base.budget import Count
from sparse_patch.methods.base.layered import LastLogits, LayeredMethod, Preset
from sparse_patch.model_shape import ModelShape
from sparse_patch.ops.selection.page_scores import page_scores
from sparse_patch.plans import PagePlan

_QWEN_2_1_5B = ModelShape("qwen2", num_layers=28, num_heads=12, num_kv_heads=2, hidden_size=1536)
_QWEN_2_7B = ModelShape("qwen2", num_layers=28, num_heads=28, num_kv_heads=4, hidden_size=3584)
_QWEN_2_14B = ModelShape("qwen2", num_layers=48, num_heads=40, num_kv_heads=8, hidden_size=5120)

_PRESETS = (
    Preset("DeepSeek-R1-Distill-Qwen-1.5B", _QWEN_2_1_5B, Roles(full=[0, 1, 2, 14, 22]), "public code's scripts"),
    Preset("DeepSeek-R1-Distill-Qwen-7B", _QWEN_2_7B, Roles(full=[0, 1, 2, 14, 22]), "public code's scripts"),
    Preset("DeepSeek-R1-Distill-Qwen-14B", _QWEN_2_14B, Roles(full=[0, 1, 2, 6, 42]), "paper, as others quote it"),
)


class Delta(LayeredMethod):
    """The top-k pages by the highest probability of any head.

    Attributes:
        budget: tokens of the list, rounded up to pages, including the last pages.
        page_size: tokens per page.
        recency_pages: number of last pages that are always read, including the current token's page.
        position_bias: this number times the page's number is subtracted from the page's score.
    """

    summary = "pages with the highest probability in any head of a few layers, one list for all heads"
    paper = "DELTA, ACL 2026 Findings, arXiv 2510.09883"
    presets = _PRESETS

    method: Literal["delta"] = "delta"
    budget: Annotated[int, Field(gt=0, le=MOST)] | None = 1024
    page_size: Literal[1, 2, 4, 8, 16, 32, 64] = 16
    recency_pages: Annotated[int, Field(ge=1, le=MOST)] = 8
    position_bias: Annotated[float, Field(ge=0, le=1e6)] = 0.0

    @property
    def fewest(self) -> int:
        return self.recency_pages * self.page_size

    @property
    def list_page_size(self) -> int:
        return self.page_size

    def pages(self, tokens: Count) -> Count:
        """See `BudgetedMethod.pages`."""
        return -(-tokens // self.page_size)

    def choose(self, call: AttentionCall, statistics: LastLogits) -> PagePlan:
        """Choose the top-k pages; see `DecodeMethod.choose`."""
        lengths = call.lengths()
        scores = page_scores(*statistics, lengths, self.page_size, call.shard)
        if self.position_bias:
            scores = scores - self.position_bias * torch.arange(scores.shape[-1], device=scores.device)
        lists = self.highest(call, scores[:, None], lengths, self.page_size, last=self.recency_pages)
        return PagePlan.of(call, *lists, self.page_size)
