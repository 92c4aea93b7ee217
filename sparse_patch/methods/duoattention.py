"""DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (ICLR 2025, arXiv 2410.10819).

Some KV heads keep everything; the others keep the first tokens and the last ones. Which heads do what is learned: each
KV head has a gate, and the gates are published as a TSV. Heads with gates below the quantile `sparsity` stream. Code:
mit-han-lab/duo-attention. This implementation differs in the following:

- Of heads with equal gates the first layers and heads are full. The code breaks ties by noise without a seed.
- The code reads the first forward of a prompt densely, at any length. A later forward reads all of its own keys and
  what was kept before, so a streaming head's window depends on the chunks. Here a query reads the first `sink` tokens
  and the last `window` including itself (one less than in the code's decode), in prompts and answers alike. If the
  prompt should be read densely, as for the published accuracy, set only `decode` and do not cut prompts into chunks.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sparse_patch.artefacts.head_schedules import HeadSchedules, schedules_for, schedules_of_duo
from sparse_patch.files.reading import MOST
from sparse_patch.methods.base.spans import ScheduledMethod
from sparse_patch.model_shape import ModelShape


class DuoAttention(ScheduledMethod):
    """Full heads and streaming heads.

    Attributes:
        calibration: TSV file of gates as DuoAttention publishes it (its name ends in .tsv), or a JSON file of head
            schedules as `sparse-patch calibrate moa` writes it, which has its own sizes.
        sparsity: share of the KV heads that stream; only for a TSV.
        sink: first tokens that a streaming head keeps; only for a TSV.
        window: last tokens that a streaming head keeps; only for a TSV.
    """

    summary = "some KV heads read everything, the others first tokens and a window"
    paper = "DuoAttention, ICLR 2025, arXiv 2410.10819"
    renamed: ClassVar[dict[str, str]] = {"recent": "window"}

    method: Literal["duoattention"] = "duoattention"
    sparsity: Annotated[float, Field(ge=0, le=1)] = 0.5
    sink: Annotated[int, Field(ge=0, le=MOST // 4)] = 64  # numbers of the rules are larger than sink + window
    window: Annotated[int, Field(gt=0, le=MOST // 4)] = 256

    def read(self, path: str, shape: ModelShape) -> tuple[HeadSchedules, str]:
        """See `ScheduledMethod.read`."""
        if path.endswith(".tsv"):
            return schedules_of_duo(path, shape, self.sparsity, self.sink, self.window)
        return schedules_for(path, shape)
