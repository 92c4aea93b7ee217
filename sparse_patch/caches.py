"""KV caches that sparse decode pays on: Transformers' own `DynamicCache` and `StaticCache`, with layers of ours.

What one layer of a cache has is asked here by the layer's number: its ring, its memory, its length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, StaticLayer

from sparse_patch.cache_layers import FixedLayer, GrowingLayer
from sparse_patch.errors import SparsePatchError, short
from sparse_patch.memory import LayerMemory
from sparse_patch.rings import FixedRingLayer, RingLayer, SpansOf


def growing_cache(config: PreTrainedConfig) -> DynamicCache:
    """The cache that `generate` makes for a model, with growing layers in place of those that copy.

    Raises:
        SparsePatchError: what was passed is not a model's config.
    """
    if not isinstance(config, PreTrainedConfig):
        raise SparsePatchError(f"growing_cache: config: expected model.config, got {short(config)}")
    cache = DynamicCache(config=config)
    adopt(cache)
    return cache


def adopt(cache: Cache, spans: Mapping[int, SpansOf] | None = None, max_length: int = 0) -> None:
    """Give a new cache of Transformers our layers; layers of other kinds, such as sliding windows, stay as they are.

    Args:
        cache: is changed.
        spans: those of layers that become rings, by number.
        max_length: tokens of prompt and answer together; 0 where that is not known. A static cache knows it itself.
    """
    if not getattr(cache, "offloading", False):
        cache.layers = [_ours(layer, (spans or {}).get(i), max_length) for i, layer in enumerate(cache.layers)]


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


@dataclass(frozen=True)
class Prompt:
    """What `generate` reads into a cache before it decodes.

    Attributes:
        end: tokens of the prompt, those that were in the cache before and padding included.
        verifies: whether it decodes by candidates, of which one forward verifies several (assisted decoding).
    """

    end: int
    verifies: bool


def note_prompt(cache: Cache, prompt: Prompt | None) -> None:
    """Tell a cache what `generate` is about to read into it; None if that is not known."""
    cache.sparse_patch_prompt = prompt  # type: ignore[attr-defined]


def prompt_of(cache: Any) -> Prompt | None:
    """What the last `generate` with a cache read into it; None if there was none."""
    prompt: Prompt | None = getattr(cache, "sparse_patch_prompt", None)
    return prompt


def ring_of(cache: Any, layer: int) -> RingLayer | None:
    """The ring that is one layer of a cache, if it is one."""
    found = _layer(cache, layer)
    return found if isinstance(found, RingLayer) else None


def keep_all(cache: Any, layer: int) -> None:
    """Put a layer that keeps every token in the place of a ring that has forgotten nothing yet."""
    ring = ring_of(cache, layer)
    assert ring is not None and ring.is_empty
    cache.layers[layer] = ring.keeping_all()


def max_length_of(cache: Any, layer: int) -> int | None:
    """Tokens of prompt and answer together that one layer of a cache is made for; None where it does not know."""
    found = _layer(cache, layer)
    if isinstance(found, RingLayer | GrowingLayer):
        return found.max_length or None
    return found.max_cache_len if isinstance(found, StaticLayer) else None


def memory_of(cache: Any, layer: int) -> LayerMemory | None:
    """The memory of one layer of a cache; None for a cache that has no room for it."""
    memory = getattr(_layer(cache, layer), "memory", None)
    return memory if isinstance(memory, LayerMemory) else None


def copies(cache: Any, layer: int) -> bool:
    """Whether a layer of a cache copies all its keys for every token."""
    return type(_layer(cache, layer)) is DynamicLayer


def _layer(cache: Any, layer: int) -> Any:
    layers = _layers(cache)
    return layers[layer] if layer < len(layers) else None


def _layers(cache: Any) -> Sequence[Any]:
    """The layers of a cache; of an encoder-decoder's those that its decoder fills."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return getattr(cache, "layers", ())


def _ours(layer: Any, spans: SpansOf | None, max_length: int) -> Any:
    if type(layer) not in (DynamicLayer, StaticLayer) or layer.is_initialized:
        return layer
    if type(layer) is DynamicLayer:
        return GrowingLayer(max_length) if spans is None else RingLayer(spans, max_length)
    length = layer.max_cache_len
    return FixedLayer(length) if spans is None else FixedRingLayer(spans, length)
