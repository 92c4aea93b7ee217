"""KV caches that sparse decode pays on: Transformers' own `DynamicCache` and `StaticCache`, with layers of ours.

What one layer of a cache has is asked here by the layer's number: its ring, its `KVState`, its length.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from sparse_patch.call import KVState
from sparse_patch.integration.caches.layers import GrowingLayer
from sparse_patch.integration.caches.rings import RingLayer


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


def kv_state_of(cache: Any, layer: int) -> KVState | None:
    """The state of one layer of a cache; None for a cache that has no room for it."""
    kv_state = getattr(_layer(cache, layer), "kv_state", None)
    return kv_state if isinstance(kv_state, KVState) else None


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
