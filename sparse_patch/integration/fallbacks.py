"""Why a call is dense: the configuration wants it, the model does, or no sparse path can serve the call."""

import torch
from torch import nn

from sparse_patch.call import Phase
from sparse_patch.integration.caches.lookup import window_of
from sparse_patch.integration.caches.rings import RingLayer
from sparse_patch.integration.masks import LazyMask
from sparse_patch.integration.request import SINKS, Request
from sparse_patch.kernels.availability import prefers_triton
from sparse_patch.plans import Dense

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Tensor arguments that do not change the arithmetic of attention. Any other tensor argument makes a call dense.
_HARMLESS_TENSORS = frozenset({"position_ids", "cache_position", "text_position_ids", "labels", "input_ids"})


def dense_by_design(request: Request, phase: Phase) -> Dense | None:
    """Dense because the configuration or the model wants it."""
    state = request.state
    method = state.config.method(phase)
    if method is None:
        return Dense(f"no {phase} method")
    if phase not in state.methods:
        return Dense("layer not selected")
    if method.method == "dense":
        return Dense("method: dense")
    if request.has_window:
        return Dense("chunked layer" if state.kind == "chunked" else "sliding-window layer")
    return None


def why_unsupported(request: Request, ring: RingLayer | None = None) -> Dense | None:
    """Dense because no sparse path can serve the call. With a ring, the call has only the keys of the forward."""
    module, mask, tensors, kwargs = request.module, request.mask, request.tensors, request.kwargs
    if not isinstance(mask, LazyMask):
        made = "mask tensor passed by the caller or computed by the model"
        return Dense("no mask was built" if mask is None else made)
    if torch.compiler.is_compiling() and (reason := _unknown_in_a_graph(mask)):
        return reason
    if not (mask.is_plain_causal or mask.window_in_step):
        return Dense("mask is more than causal (packed sequences, prefix-LM or bidirectional blocks)")
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        return Dense("attention is not causal")
    if request.wants_weights:
        return Dense("output_attentions")
    learned = tensors if request.sinks is None else (*tensors, request.sinks)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned):
        return Dense("gradients are needed (use torch.no_grad for inference)")
    if kwargs.get("dropout"):
        return Dense("attention dropout")
    if request.sinks is None and _has(module, "sinks"):
        return Dense("attention sinks that are not handed to the attention function")
    if request.sinks is not None and request.sinks.shape != (tensors[0].shape[1],):
        return Dense("attention sinks that are not one for each query head")
    for name, value in kwargs.items():
        if torch.is_tensor(value) and name not in _HARMLESS_TENSORS and name != SINKS:
            return Dense(f"argument {name}")
    if reason := _unserved_dtypes(tensors):
        return reason
    keys = mask.kv_length if ring is None else mask.q_length
    described = mask.kv_length if ring is None else ring.get_mask_sizes(mask.q_length)[0]
    if (tensors[1].shape[2], mask.kv_length) != (keys, described) or not mask.fits or _has_other_window(request):
        return Dense("the cache returns other keys than the mask describes")
    if not mask.has_left_padding_only:
        return Dense("padding that is not on the left")
    return None


def _has(module: nn.Module, name: str) -> bool:
    """Whether a module has an attribute that is not None. `getattr` of a missing one is slow, and this is per call."""
    owners = vars(module), module._parameters, module._buffers
    return any(owner.get(name) is not None for owner in owners)


def _has_other_window(request: Request) -> bool:
    """Whether, in a step, the model and its mask want another window than the layer of the cache keeps."""
    mask = request.mask
    if mask.step is None:
        return False
    asked, kept = request.kwargs.get("sliding_window"), window_of(mask.forward.cache, request.state.cache_layer)
    return mask.window != kept or (asked or mask.window) != kept


def _unknown_in_a_graph(mask: LazyMask) -> Dense | None:
    """Dense because a mask made inside a graph cannot be read on the host."""
    if mask.is_prepared:
        return None
    if not mask.is_plain_causal:
        return Dense("mask inside torch.compile that may be of packed sequences (use_cache=True rules them out)")
    if mask.padding is not None:
        return Dense("padding mask inside torch.compile (pass none with prompts of one length)")
    if mask.end_on_device is not None and not mask.is_decode:
        return Dense("prompt of a static cache inside torch.compile")
    return None


def untraceable(request: Request, phase: Phase) -> Dense | None:
    """Dense because `torch.compile` cannot trace what plans or executes the call.

    `torch.compile` traces decode and spans on every backend. Other plans for prefill are lists of blocks. Triton's
    kernels read these lists on the device, other backends read them on the host.
    """
    method = request.state.methods.get("prefill")
    if phase == "decode" or not torch.compiler.is_compiling() or (method and method.retention):
        return None
    if prefers_triton(request.query) and request.state.config.backend not in ("torch", "reference"):
        return None
    return Dense("prefill inside torch.compile without Triton's kernels")


def _unserved_dtypes(tensors: tuple[torch.Tensor, ...]) -> Dense | None:
    dtype, *others = [tensor.dtype for tensor in tensors]
    if dtype not in _DTYPES:
        return Dense(f"dtype {dtype}")
    if others != [dtype, dtype]:
        names = ", ".join(map(str, dict.fromkeys((dtype, *others))))
        return Dense(f"queries, keys and values in several dtypes ({names})")
    return None
