"""The cache of `generate` on a patched model."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from sparse_patch.errors import SparsePatchError, short
from sparse_patch.integration.caches.layers import RoomLayer
from sparse_patch.integration.caches.lookup import Prompt, note_prompt, prompt_of
from sparse_patch.integration.caches.making import adopt
from sparse_patch.integration.caches.rings import RingLayer, SpansOf
from sparse_patch.integration.patch import PATCHING, is_patched, patch_of, state_of, transformers_model
from sparse_patch.integration.transformers_internals import dropped_mask_length, prepare_cache_of_class
from sparse_patch.methods.base.bound import Retention, Spans
from sparse_patch.model_shape import attention_kind, can_forget, config_of_layer, kv_heads_of
from sparse_patch.tensor_parallel import HeadShard


def span_cache(model: nn.Module, max_length: int) -> DynamicCache:
    """The cache that `generate` makes for a model under its current patch, for your own forwards or for a longer text.

    Layers whose decode method has spans (`moa`, `duoattention`, `streamingllm`) keep the keys of the spans and forget
    the rest. The other layers keep everything.

    Args:
        model: the model, patched or not.
        max_length: tokens of prompt and answer together, including padding, in all turns.

    Returns:
        An empty cache, for this model as long as it has this patch.

    Raises:
        PatchError: the model is not a Transformers model.
        SparsePatchError: `max_length` is not a positive integer.
    """
    root = transformers_model(model)
    if not isinstance(max_length, int) or max_length < 1:
        raise SparsePatchError(f"span_cache: max_length: expected a number of tokens above 0, got {short(max_length)}")
    cache = DynamicCache(config=root.config)
    adopt(cache, spans_of(root), max_length)
    return cache


def spans_of(root: PreTrainedModel) -> dict[int, SpansOf]:
    """By layer, the spans of the layers that decode by spans and can have a ring."""
    config = root.config.get_text_config(decoder=True)
    with PATCHING:
        modules = patch_of(root).attention if is_patched(root) and can_forget(config) else []
        states = [state_of(module) for module in modules]
    spans: dict[int, SpansOf] = {}
    for state in states:
        retention = state.decoder.retention if state.decoder is not None else None
        if retention is not None and attention_kind(config, state.layer) == "full":
            in_all = kv_heads_of(config_of_layer(config, state.layer))
            spans[state.layer] = partial(_spans_here, retention, state.shard, state.layer, in_all)
    return spans


def _spans_here(retention: Retention, shard: HeadShard, layer: int, in_all: int, length: int, kv_heads: int) -> Spans:
    """The spans of the `kv_heads` KV heads that this process has, out of a layer's `in_all`."""
    return retention.spans_of(shard.of_layer(kv_heads, in_all), layer, length, kv_heads)


def prepare_cache(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: GenerationMode,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Make the cache of `generate` if the user passes none, with layers that do not copy and that have a `KVState`.

    If candidates are taken back (assisted decoding), every layer keeps everything.
    """
    given = model_kwargs.get("past_key_values")
    prepare_cache_of_class(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, Cache):
        return
    is_assistant = bool(getattr(generation_config, "is_assistant", False))  # this model makes the candidates
    verifies = generation_mode == GenerationMode.ASSISTED_GENERATION
    if given is None:
        adopt(cache, None if is_assistant or verifies else spans_of(self), max_cache_length)
    if not (is_assistant and prompt_of(given)):  # an assistant is called again and again with the same text
        end = _prompt_length(generation_config, model_kwargs)
        note_prompt(cache, None if end is None else Prompt(end, verifies))
    for layer in cache.layers:
        if isinstance(layer, RingLayer | RoomLayer):
            layer.make_room(max_cache_length)


COMPILED_CALL = "get_compiled_call"
"""The model method from which `generate` gets the compiled forward for steps with a static cache, and for chunks."""


def compiled_call(self: Any, compile_config: Any) -> Callable[..., Any]:
    """The compiled forward for steps of one token, and the model's own for chunks of a prompt.

    `generate(prefill_chunk_size=...)` with a static cache compiles its chunks too. A compiled chunk takes longer to
    compile than to compute, and the length of a prompt is not known inside a graph, so it would be dense.
    """
    compiled = getattr(type(self), COMPILED_CALL)(self, compile_config)

    def call(*args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids")
        is_chunk = torch.is_tensor(ids) and ids.shape[1] > 1
        return self(*args, **kwargs) if is_chunk else compiled(*args, **kwargs)

    return call


def _prompt_length(generation_config: Any, model_kwargs: dict[str, Any]) -> int | None:
    """Tokens of the prompt, including those in the cache and padding; None if `generate` does not say."""
    mask = model_kwargs.get("attention_mask")
    if mask is not None:
        return int(mask.shape[1])
    length = dropped_mask_length(generation_config)
    if length is None and generation_config.max_new_tokens is not None:
        length = generation_config.max_length - generation_config.max_new_tokens
    return length
