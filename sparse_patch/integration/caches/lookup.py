"""Look up what one layer of a cache has, by the layer's number: its ring, its `KVState`, its length.

The caches are Transformers' own `DynamicCache` and `StaticCache`, with our layers, which make sparse decode worthwhile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from sparse_patch.call import KVState
from sparse_patch.integration.caches.layers import GrowingLayer
from sparse_patch.integration.caches.rings import RingLayer
from sparse_patch.integration.caches.windows import WindowLayer


@dataclass(frozen=True)
class Prompt:
    """What `generate` reads into a cache before it decodes.

    Attributes:
        end: tokens of the prompt, including padding and those that were in the cache before.
        verifies: whether `generate` decodes by candidates, several of which one forward verifies (assisted decoding).
    """

    end: int
    verifies: bool


def note_prompt(cache: Cache, prompt: Prompt | None) -> None:
    """Tell a cache which prompt `generate` is about to read into it; None if not known."""
    cache.sparse_patch_prompt = prompt  # type: ignore[attr-defined]


def prompt_of(cache: Any) -> Prompt | None:
    """The prompt that the last `generate` with this cache read into it; None if there was none."""
    prompt: Prompt | None = getattr(cache, "sparse_patch_prompt", None)
    return prompt


def ring_of(cache: Any, layer: int) -> RingLayer | None:
    """One layer of a cache if it is a ring; else None."""
    found = _layer(cache, layer)
    return found if isinstance(found, RingLayer) else None


def keep_all(cache: Any, layer: int) -> None:
    """Replace a ring that has forgotten nothing yet by a layer that keeps every token."""
    ring = ring_of(cache, layer)
    assert ring is not None and ring.is_empty
    cache.layers[layer] = ring.keeping_all()


def max_length_of(cache: Any, layer: int) -> int | None:
    """Tokens of prompt and answer together that one layer of a cache is made for; None if the layer does not know."""
    found = _layer(cache, layer)
    if isinstance(found, RingLayer | GrowingLayer):
        return found.max_length or None
    return found.max_cache_len if isinstance(found, StaticLayer) else None


def window_of(cache: Any, layer: int) -> int | None:
    """The width of the window that one layer of a cache keeps for steps; None if it keeps none."""
    found = _layer(cache, layer)
    return found.sliding_window if isinstance(found, WindowLayer) else None


def kv_state_of(cache: Any, layer: int) -> KVState | None:
    """The state of one layer of a cache; None if the layer has no room for one."""
    kv_state = getattr(_layer(cache, layer), "kv_state", None)
    return kv_state if isinstance(kv_state, KVState) else None


def copies(cache: Any, layer: int) -> bool:
    """Whether a layer of a cache copies all its keys for every token."""
    return type(_layer(cache, layer)) is DynamicLayer


def _layer(cache: Any, layer: int) -> Any:
    layers = cache.layers if type(cache) is DynamicCache else _layers(cache)  # asked several times for every layer
    return layers[layer] if layer < len(layers) else None


def _layers(cache: Any) -> Sequence[Any]:
    """The layers of a cache; for an encoder-decoder, those that its decoder fills."""
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return getattr(cache, "layers", ())
