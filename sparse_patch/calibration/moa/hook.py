"""Replace a model's attention while a `with` block runs: for gradients, and for masks per head."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from sparse_patch.call import AttentionCall
from sparse_patch.config import load_config
from sparse_patch.errors import TaskError
from sparse_patch.integration.layer_state import AttentionFunction, LayerState
from sparse_patch.integration.patch import Patch, state_of, transformers_model
from sparse_patch.integration.patching import patched

# Takes a call, and a function that computes it as the model does, `[B, Sq, Hq, Dv]`; returns the same shape.
Attend = Callable[[AttentionCall, Callable[[], torch.Tensor]], torch.Tensor]

_DENSE = {"prefill": {"method": "dense"}, "decode": {"method": "dense"}}


@contextmanager
def attention_by(model: PreTrainedModel, attend: Attend) -> Iterator[list[torch.nn.Module]]:
    """Let `attend` compute the layers with full attention; give the attention modules of all layers, in order.

    Unlike `observed`, it also works for calls that need gradients. Afterwards the model is as before. Layers with
    another attention (sliding windows, sinks in the softmax) run as they are.

    Raises:
        PatchError: the model is already patched, or cannot be patched.
        TaskError: raised inside the block, if the model caps its logits.
    """
    with patched(model, load_config(_DENSE)):
        patch = transformers_model(model).sparse_patch
        assert isinstance(patch, Patch)
        for module in patch.attention:
            state = state_of(module)
            state.dense = _by(attend, state, state.dense)
        yield patch.attention


def _by(attend: Attend, state: LayerState, own: AttentionFunction) -> AttentionFunction:
    def attention(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def dense() -> torch.Tensor:
            return own(module, q, k, v, mask, **kwargs)[0]

        if kwargs.get("sliding_window") or getattr(module, "sinks", None) is not None:
            return dense(), None
        if kwargs.get("softcap") is not None:
            raise TaskError(
                "--model: its logits are capped, which the search does not differentiate; use another method"
            )
        scaling = kwargs.get("scaling")
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        return attend(AttentionCall(q, k, v, scale, state.layer, "prefill"), dense), None

    return attention
