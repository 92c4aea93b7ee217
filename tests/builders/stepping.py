"""Decoding step by step, to change something between two steps."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from sparse_patch import span_cache

Change = Callable[[PreTrainedModel], Any]


def prompt(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Random tokens, int64 `[rows, length]`."""
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def generated(model: PreTrainedModel, ids: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    """The logits of each generated token, `[B, new, vocabulary]`."""
    output = model.generate(
        ids, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )
    return torch.stack(output.logits, 1)


@torch.no_grad()
def stepped(
    model: PreTrainedModel,
    ids: torch.Tensor,
    new: int,
    cache: Cache | None = None,
    at: int | None = None,
    change: Change = lambda model: None,
    **arguments: Any,
) -> torch.Tensor:
    """The logits of each token, as `generated` gives them, by calls of the model; `change` comes before step `at`."""
    cache = span_cache(model, ids.shape[1] + new) if cache is None else cache
    logits = [model(input_ids=ids, past_key_values=cache, **arguments).logits[:, -1]]
    for step in range(1, new):
        if step == at:
            change(model)
        token = logits[-1].argmax(-1, keepdim=True)
        logits.append(model(input_ids=token, past_key_values=cache, **arguments).logits[:, -1])
    return torch.stack(logits, 1)
