"""The size of a cache in bytes."""

from dataclasses import dataclass

from transformers import Cache

from sparse_patch.errors import SparsePatchError, short
from sparse_patch.integration.caches.lookup import _layers
from sparse_patch.integration.caches.rings import RingLayer


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of keys and values.

    Attributes:
        allocated: the memory of the cache's tensors.
        planned: the size of the spans; for layers that keep everything, the size of what they keep.
        dense: the size if each layer kept `max_length` tokens of every head, if `max_length` is known.
    """

    allocated: int
    planned: int
    dense: int


def cache_bytes(cache: Cache) -> CacheBytes:
    """The memory of a cache that has seen a prompt, compared with the size of its spans and of a dense cache.

    Raises:
        SparsePatchError: the argument is not a cache of Transformers.
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
