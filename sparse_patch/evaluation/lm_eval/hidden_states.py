"""What a model makes of a batch before its head, and its head on any part of that."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparse_patch.integration.patch import transformers_model


class HiddenStates:
    """What a model made of a batch before its head, and its head on any part of that.

    The head is the model's forward with the decoder's part answered already: soft caps, scales and whatever else stands
    after the last layer are the model's own, not a copy of them.
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
        """Logits after some tokens of some rows, `[rows, tokens, vocabulary]`."""
        part = copy.copy(self._output)
        part.last_hidden_state = self._output.last_hidden_state[rows, tokens]
        ids = torch.zeros(part.last_hidden_state.shape[:2], dtype=torch.long, device=part.last_hidden_state.device)
        with answering(self._decoder, part):
            logits: torch.Tensor = self._model(input_ids=ids).logits
        return logits


@contextmanager
def answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """For a `with` block, the module returns the answer whatever it is asked."""
    own = vars(module).get("forward")  # accelerate's hooks set one
    module.forward = lambda *_, **__: answer
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
