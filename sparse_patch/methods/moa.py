"""MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression (Fu et al. 2024, arXiv 2406.14909).

Every head keeps the first tokens and a window whose length is a line over the length of the text; the lines are
searched for offline, so that the loss on answers that need distant text grows least. `artefacts.head_schedules` has the
rule, the file and where the public code (thu-nics/MoA) differs. Beside what is said there:

- The length M of the rule is that of prompt and answer together, by the `max_new_tokens` of the call; the public code
  has a setting of its own for the answer, 1024 by default.
- Rules are for KV heads; published plans, which are for query heads, are reduced when they are read.
- Batches with left padding, prompts in chunks, later turns of a chat and beam search; the public code has none.
"""

from typing import Literal

from sparse_patch.artefacts.head_schedules import HeadSchedules, schedules_for
from sparse_patch.call import AttentionCall
from sparse_patch.methods.base.spans import Length, ScheduledMethod
from sparse_patch.model_shape import ModelShape


class MoA(ScheduledMethod):
    """Sinks and a window for each KV head, by a plan that was searched for.

    Attributes:
        calibration: JSON file that `sparse-patch calibrate moa` wrote, or a plan as MoA publishes it.
        max_length: tokens of prompt and answer together, where the cache does not know: it does if `generate` made it
            or `span_cache`. None for the keys that a call has, so that windows grow while a text does.
    """

    summary = "first tokens and a window, for each KV head its own, by a plan from calibration"
    paper = "MoA, COLM 2025, arXiv 2406.14909"

    method: Literal["moa"] = "moa"
    max_length: Length | None = None

    def read(self, path: str, shape: ModelShape) -> tuple[HeadSchedules, str]:
        """See `ScheduledMethod.read`."""
        return schedules_for(path, shape)

    def total_length(self, call: AttentionCall) -> int:
        """See `SpanMethod.total_length`."""
        return call.max_length or self.max_length or call.kv_length
