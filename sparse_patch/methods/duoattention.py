"""DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (ICLR 2025, arXiv 2410.10819).

Some KV heads keep everything, the others the first tokens and the last ones. Which ones is learned: a gate for each KV
head, published as a TSV; those below the quantile `sparsity` stream. Code: mit-han-lab/duo-attention. Differences:

- Of equal gates the first layers and heads are full, where the code breaks ties by noise without a seed.
- The code reads the first forward of a prompt densely, whatever its length, and of a later one all keys of that forward
  beside what it kept, so that a streaming head's window depends on the chunks. Here a query reads the first `sink`
  tokens and the last `window` up to itself (one less than in the code's decode), in prompts and answers alike. For a
  prompt that is read densely, as the published accuracy has it, set `decode` alone and do not cut prompts into chunks.
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
        calibration: TSV file of gates as DuoAttention publishes it (a name that ends in .tsv), or a JSON file as
            `sparse-patch calibrate moa` writes it, which has sizes of its own.
        sparsity: share of the KV heads that stream. This and what follows is for a TSV.
        sink: first tokens that a streaming head keeps.
        window: last tokens that it keeps.
    """

    summary = "some KV heads read everything, the others first tokens and a window"
    paper = "DuoAttention, ICLR 2025, arXiv 2410.10819"
    renamed: ClassVar[dict[str, str]] = {"recent": "window"}

    method: Literal["duoattention"] = "duoattention"
    sparsity: Annotated[float, Field(ge=0, le=1)] = 0.5
    sink: Annotated[int, Field(ge=0, le=MOST // 4)] = 64  # the rules count more than sink and window together
    window: Annotated[int, Field(gt=0, le=MOST // 4)] = 256

    def read(self, path: str, shape: ModelShape) -> tuple[HeadSchedules, str]:
        """See `ScheduledMethod.read`."""
        if path.endswith(".tsv"):
            return schedules_of_duo(path, shape, self.sparsity, self.sink, self.window)
        return schedules_for(path, shape)
