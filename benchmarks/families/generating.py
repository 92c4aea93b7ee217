"""The ways to run a tiny model through `generate`, and the distance between their logits."""

from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import VOCAB, tiny_models
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

LENGTH, PADDING, NEW = 200, 30, 5


class NotShrunk(Exception):
    """A class has no tiny model that generates; the message gives the reason."""


@dataclass(frozen=True)
class Way:
    """One way to run a model: its inputs, and whether its cache is static."""

    rows: int
    static: bool = False

    @property
    def says(self) -> str:
        return f"{self.rows} prompts" if self.rows > 1 else "static cache" if self.static else "one prompt"

    def inputs(self) -> dict[str, Any]:
        """The arguments of `generate`. The first of two prompts is left-padded."""
        ids = torch.randint(3, VOCAB - 6, (2, LENGTH), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[0, :PADDING] = 0
        inputs = {"input_ids": ids, "attention_mask": mask} if self.rows == 2 else {"input_ids": ids[1:]}
        return {**inputs, "cache_implementation": "static"} if self.static else inputs


PADDED, ALONE, STATIC = Way(2), Way(1), Way(1, static=True)


class Dictated(LogitsProcessor):
    """Makes every run generate the same tokens, whatever the model would choose."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = 5 + 7 * (input_ids.shape[1] - LENGTH) % (VOCAB - 10)
        dictated = torch.full_like(scores, -torch.inf)
        dictated[:, token] = 0
        return dictated


@torch.no_grad()
def logits_of(model: PreTrainedModel, way: Way) -> torch.Tensor:
    """The logits of each step of `generate`, `[steps, B, vocabulary]`."""
    torch.manual_seed(0)  # Reformer hashes at random
    result: Any = model.generate(  # type: ignore[operator]
        **way.inputs(),
        max_new_tokens=NEW,
        do_sample=False,
        disable_compile=True,
        logits_processor=LogitsProcessorList([Dictated()]),
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(result.logits).float()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative RMS of the worst step and row; infinity if a value is not finite."""
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return torch.inf
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def model_that_generates(name: str) -> tuple[PreTrainedModel, torch.Tensor]:
    """The tiny model of a class, and its unpatched logits on the padded prompts."""
    reason = ""
    for build in tiny_models(name):
        try:
            model = build()
            logits = logits_of(model, PADDED)
        except Exception as error:
            reason = in_one_line(error)
            continue
        if bool(logits.isfinite().all()) and bool(logits.any()):
            return model, logits
        reason = "its logits are not finite"
    raise NotShrunk(reason)


def in_one_line(error: BaseException) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
