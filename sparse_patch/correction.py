"""Periodic KV-cache correction: the tokens that were decoded sparsely are read once more, densely.

Keys and values of a sparsely decoded token carry the error of the layers below. TidalDecode (arXiv 2410.05076, section
on KV cache correction; in neither of its public codes) recomputes them every so many tokens: a dense forward of the
tokens since the last correction, at their own positions, writes their keys and values anew.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparse_patch.caches import memory_of
from sparse_patch.memory import LayerMemory

_TOKENS = "tokens since the correction"  # int64 [B, n], beside the keys of the first layer: they follow its rows


class Correction:
    """A forward pre-hook of the model that corrects the cache before the step after every `period` sparse ones.

    Only for caches of which the host knows the length, that can be cut and that have a memory: those that `generate`
    makes on a patched model, unless static. Tokens that come several at a time are dense and need no correction.

    Attributes:
        period: tokens between corrections.
        layer: index of the first attention layer, whose memory has the tokens.
    """

    def __init__(self, period: int, layer: int) -> None:
        self.period = period
        self.layer = layer

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """See `torch.nn.Module.register_forward_pre_hook` with `with_kwargs`, and `join_forward` for calls without."""
        if kwargs is None:
            return
        cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        memory = None if torch.compiler.is_compiling() else memory_of(cache, self.layer)
        length = getattr(cache, "get_seq_length", int)() if memory is not None else None
        if memory is None or memory.at_rest or ids is None or not isinstance(length, int):
            return
        if ids.shape[1] > 1 or length == 0:  # a prompt
            memory.tensors.pop(_TOKENS, None)
            return
        decoded = self._decoded(memory, ids)
        if decoded.shape[1] == self.period:
            self._correct(model, cache, decoded, kwargs)
            decoded = decoded[:, :0]
        memory.tensors[_TOKENS] = torch.cat([decoded, ids], dim=1)

    def _decoded(self, memory: LayerMemory, ids: torch.Tensor) -> torch.Tensor:
        decoded = memory.tensors.get(_TOKENS)
        return ids[:, :0] if decoded is None or len(decoded) != len(ids) else decoded

    @torch.no_grad()
    def _correct(self, model: nn.Module, cache: Any, ids: torch.Tensor, step: dict[str, Any]) -> None:
        """Read the tokens again; `step` are the arguments of the forward of the token that comes after them."""
        mask, position = step.get("attention_mask"), step.get("position_ids")
        if mask is not None and mask.ndim == 2:
            mask = mask[:, :-1]
        if position is not None:
            position = position - ids.shape[1] + torch.arange(ids.shape[1], device=ids.device)
        cache.crop(-ids.shape[1])
        with _at_rest(cache):
            model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1)


@contextmanager
def _at_rest(cache: Any) -> Iterator[None]:
    """The forward with this cache in a `with` block is dense; other forwards of the model are not concerned."""
    memories = [memory for layer in range(len(cache.layers)) if (memory := memory_of(cache, layer)) is not None]
    for memory in memories:
        memory.at_rest = True
    try:
        yield
    finally:
        for memory in memories:
            memory.at_rest = False
