"""The bytes of a cache."""

from dataclasses import dataclass

from transformers import Cache

from sparse_patch.errors import SparsePatchError, short
from sparse_patch.integration.caches.lookup import _layers
from sparse_patch.integration.caches.rings import RingLayer


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of keys and values.

    Attributes:
        allocated: what the cache's tensors take.
        planned: what its spans have, and of layers that keep everything, what they keep.
        dense: what the same layers would take if each kept `max_length` tokens of every head, where that is known.
    """

    allocated: int
    planned: int
    dense: int


def cache_bytes(cache: Cache) -> CacheBytes:
    """The memory of a cache that has seen a prompt, beside what its plan says and what a dense cache would take.

    Raises:
        SparsePatchError: what was passed is not a cache of Transformers.
    """
    if not isinstance(cache, Cache):
        raise SparsePatchError(f"cache_bytes: cache: expected a Cache of Transformers, got {short(cache)}")
    allocated = planned = dense = 0
    for layer in _layers(cache):
        for kept in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if kept is None:
                continue
            allocated += kept.untyped_storage().nbytes()
            size = kept.numel() * kept.element_size()
            if isinstance(layer, RingLayer) and layer.layout is not None:
                token = kept.shape[0] * kept.shape[2] * kept.element_size()
                planned += token * layer.layout.total
                dense += token * len(layer.layout.sinks) * layer.max_length
            else:
                planned, dense = planned + size, dense + size
    return CacheBytes(allocated, planned, dense)
