"""Make new caches with our layers in them."""

from collections.abc import Mapping
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from sparse_patch.errors import SparsePatchError, short
from sparse_patch.integration.caches.layers import FixedLayer, GrowingLayer
from sparse_patch.integration.caches.rings import FixedRingLayer, RingLayer, SpansOf
from sparse_patch.integration.caches.windows import WindowLayer


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """The cache that `generate` makes for a model, with layers that grow in place instead of layers that copy.

    Raises:
        SparsePatchError: the argument is not a model's config.
    """
    if not isinstance(config, PreTrainedConfig):
        raise SparsePatchError(f"growing_cache: config: expected model.config, got {short(config)}")
    cache = DynamicCache(config=config)
    adopt(cache)
    return cache


def adopt(cache: Cache, spans: Mapping[int, SpansOf] | None = None, max_length: int = 0) -> None:
    """Give a new cache of Transformers our layers. Layers of other kinds stay as they are.

    Args:
        cache: the cache to change.
        spans: the spans of the layers that become rings, by layer number.
        max_length: tokens of prompt and answer together; 0 if not known. A static cache knows this number itself.
    """
    if not getattr(cache, "offloading", False):
        cache.layers = [_ours(layer, (spans or {}).get(i), max_length) for i, layer in enumerate(cache.layers)]


def _ours(layer: Any, spans: SpansOf | None, max_length: int) -> Any:
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer) or layer.is_initialized:
        return layer
    if type(layer) is DynamicSlidingWindowLayer:
        return WindowLayer(layer.sliding_window, max_length)
    if type(layer) is DynamicLayer:
        return GrowingLayer(max_length) if spans is None else RingLayer(spans, max_length)
    length = layer.max_cache_len
    return FixedLayer(length) if spans is None else FixedRingLayer(spans, length)
