"""MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression (Fu et al. 2024, arXiv 2406.14909).

Every KV head keeps the first tokens and a window whose length is a linear function of the length of the text. The
functions are searched for offline, so that the loss on answers that need distant text grows least.
`artefacts.head_schedules` describes the rule, the file and where the public code (thu-nics/MoA) differs. These points
differ as well:

- The length M of the rule is that of prompt and answer together, from the `max_new_tokens` of the call. The public code
  has a separate setting for the answer, 1024 by default.
- Rules are for KV heads. Published head schedules are for query heads and are reduced to KV heads when they are read.
- Batches with left padding, prompts in chunks, later turns of a chat and beam search are served. The public code serves
  none of these.
"""

from typing import Literal

from sparse_patch.artefacts.head_schedules import HeadSchedules, schedules_for
from sparse_patch.call import AttentionCall
from sparse_patch.methods.base.spans import Length, ScheduledMethod
from sparse_patch.model_shape import ModelShape


class MoA(ScheduledMethod):
    """A sink and a window for each KV head, by head schedules that were searched for.

    Attributes:
        calibration: JSON file that `sparse-patch calibrate moa` wrote, or head schedules as MoA publishes them.
        max_length: tokens of prompt and answer together, used if the cache does not know this number. A cache that
            `generate` or `span_cache` made knows it. None for the number of keys in the call; windows then grow with
            the text.
    """

    summary = "first tokens and a window of its own for each KV head, by calibrated head schedules"
    paper = "MoA, COLM 2025, arXiv 2406.14909"

    method: Literal["moa"] = "moa"
    max_length: Length | None = None

    def read(self, path: str, shape: ModelShape) -> tuple[HeadSchedules, str]:
        """See `ScheduledMethod.read`."""
        return schedules_for(path, shape)

    def total_length(self, call: AttentionCall) -> int:
        """See `SpanMethod.total_length`."""
        return call.max_length or self.max_length or call.kv_length
