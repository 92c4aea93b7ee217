"""The hidden states of a batch before the model's head, and the head applied to any part of them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparse_patch.integration.patch import transformers_model


class HiddenStates:
    """The hidden states of a batch before the model's head, and the head applied to any part of them.

    To apply the head, the model's own forward runs with the decoder's output filled in. So soft caps, scales and
    everything else after the last layer are the model's own code, not a copy of it.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> None:
        self._model = transformers_model(model)
        self._decoder = self._model.base_model
        inputs = {"input_ids": ids, "attention_mask": mask}
        if not mask.all():  # as generate does for a padded batch
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        self._output = self._decoder(**inputs, use_cache=False)
        self.length = ids.shape[1]

    def logits(self, rows: slice, tokens: slice) -> torch.Tensor:
        """Logits at the given tokens of the given rows, `[rows, tokens, vocabulary]`."""
        part = copy.copy(self._output)
        part.last_hidden_state = self._output.last_hidden_state[rows, tokens]
        ids = torch.zeros(part.last_hidden_state.shape[:2], dtype=torch.long, device=part.last_hidden_state.device)
        with answering(self._decoder, part):
            logits: torch.Tensor = self._model(input_ids=ids).logits
        return logits


@contextmanager
def answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """For a `with` block: the module returns `answer` for any input."""
    own = vars(module).get("forward")  # accelerate's hooks set a forward of their own
    module.forward = lambda *_, **__: answer
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
