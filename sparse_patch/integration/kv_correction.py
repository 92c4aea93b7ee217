"""Periodic KV-cache correction: the sparsely decoded tokens are read once more, densely.

Keys and values of a sparsely decoded token carry the error of the layers below. TidalDecode (arXiv 2410.05076, section
on KV cache correction; in neither of its public codes) recomputes them periodically: after a fixed number of tokens, a
dense forward of the tokens since the last correction, at their own positions, writes their keys and values again. On a
GPU its attention is our own kernel, as in the steps, so that a generation gives the same every time.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparse_patch.call import KVState, TensorSlot
from sparse_patch.integration.caches.lookup import kv_state_of

_CORRECTION = TensorSlot("kv correction", in_steps=False)
_TOKENS = "since the correction"  # int64 [B, n], kept with the keys of the first layer, so they follow its rows


class Correction:
    """A forward pre-hook of the model that corrects the cache after every `period` sparse steps, before the next step.

    A cache is corrected if the host knows its length, and every layer can be cut and has a `KVState`. These are the
    caches that `generate` makes on a patched model, unless they are static or the model has sliding windows or
    recurrent layers. Tokens that come several at a time are dense and need no correction.

    Attributes:
        period: number of tokens between corrections.
        warns: whether to warn that a cache of `generate` cannot be corrected.
    """

    def __init__(self, period: int, warns: bool) -> None:
        self.period = period
        self.warns = warns

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """See `torch.nn.Module.register_forward_pre_hook` with `with_kwargs`; without `kwargs` see `join_forward`."""
        if kwargs is None or torch.compiler.is_compiling():
            return
        cache: Any = kwargs.get("past_key_values")
        kv_state, ids = self._first_state(cache), kwargs.get("input_ids")
        if kv_state is None or kv_state.at_rest or ids is None or not isinstance(length := cache.get_seq_length(), int):
            return
        if ids.shape[1] > 1 or length == 0:  # a prompt
            kv_state.of(_CORRECTION).pop(_TOKENS, None)
            return
        decoded = _decoded(kv_state, ids, length)
        if decoded.shape[1] == self.period:
            self._correct(model, cache, decoded, kwargs)
            kv_state.corrected, decoded = length, decoded[:, :0]
        kv_state.of(_CORRECTION)[_TOKENS] = torch.cat([decoded, ids], dim=1)

    def _first_state(self, cache: Any) -> KVState | None:
        """The state of the first layer, which holds the tokens; None if the cache cannot be corrected."""
        states = [kv_state_of(cache, layer) for layer in range(len(getattr(cache, "layers", ())))]
        if not any(states):
            return None
        if not all(states) and self.warns:
            reason = "layers with sliding windows or recurrence cannot take tokens back"
            warnings.warn(f"sparse_patch: the cache is not corrected: {reason}", stacklevel=2)
        return states[0] if all(states) else None

    @torch.no_grad()
    def _correct(self, model: nn.Module, cache: Any, ids: torch.Tensor, step: dict[str, Any]) -> None:
        """Read the tokens again. `step` holds the arguments of the forward of the token that comes after them."""
        mask, position = step.get("attention_mask"), step.get("position_ids")
        if mask is not None and mask.ndim == 2:
            mask = mask[:, :-1]
        if position is not None:
            position = position - ids.shape[1] + torch.arange(ids.shape[1], device=ids.device)
        cache.crop(-ids.shape[1])
        with _at_rest(cache):
            model(input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1)


def _decoded(kv_state: KVState, ids: torch.Tensor, length: int) -> torch.Tensor:
    """The tokens decoded since the last correction, `[B, n]`, in a cache of `length` tokens; `ids` come next."""
    decoded, number = kv_state.of(_CORRECTION).get(_TOKENS), length - kv_state.corrected
    if decoded is not None and len(decoded) == len(ids) and 0 <= number <= decoded.shape[1]:
        return decoded[:, :number]  # fewer than before if the cache was cut
    kv_state.corrected = length
    return ids[:, :0]


@contextmanager
def _at_rest(cache: Any) -> Iterator[None]:
    """Make forwards with this cache dense in a `with` block. Other forwards of the model are not affected."""
    states = [kv_state for layer in range(len(cache.layers)) if (kv_state := kv_state_of(cache, layer)) is not None]
    for kv_state in states:
        kv_state.at_rest = True
    try:
        yield
    finally:
        for kv_state in states:
            kv_state.at_rest = False
