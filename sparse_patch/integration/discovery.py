"""Discovery: which modules of a model are the attention of its decoder, and why a model cannot be patched.

Attention is recognised by what it does, not by its name: its forward asks Transformers' attention interface. What else
a forward asks is read from its bytecode. Names only distinguish a model whose attention does not ask the interface from
a model without attention.
"""

import dis
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from sparse_patch.errors import PatchError
from sparse_patch.integration.transformers_internals import asks_the_interface
from sparse_patch.models.loaders import LOADERS

_IMPLEMENTATIONS = frozenset({"eager", "sdpa", "flash_attention_2", "flex_attention"})


def attention_modules(root: PreTrainedModel) -> dict[str, nn.Module]:
    """The causal self-attention modules of the decoder, by name. The hook reaches and serves every one of them.

    Raises:
        PatchError: there are none, some cannot be reached or served, or the model is patched already.
    """
    model = type(root).__name__
    if any(hasattr(module, "sparse_patch") for module in root.modules()):
        raise PatchError(f"{model} is patched already; pass replace=True, or call unpatch_model first")
    decoder = _decoder_config(root)
    causal = {name: module for name, module in root.named_modules() if _is_causal_self_attention(module, decoder)}
    if unreached := _unreached(root, decoder, bool(causal)):
        name, module = next(iter(unreached.items()))
        raise PatchError(
            f"{model}: {len(unreached)} of {len(causal) + len(unreached)} attention modules do not ask Transformers' "
            f"attention interface, first {name} ({type(module).__module__}.{type(module).__qualname__}); "
            f"{_way_in(root, module)}"
        )
    if not causal:
        raise PatchError(f"{model}: {_why_none(root, decoder)}")
    # If some modules have a layer, a module without one is not a layer's attention: it may pool an image.
    found = {name: module for name, module in causal.items() if _layer_of(module) is not None}
    if reason := _why_unserved(found or causal):
        raise PatchError(f"{model} cannot be patched, run it as it is: {reason}")
    return found


def dispatch_scope(module: nn.Module) -> dict[str, Any] | None:
    """The globals of the module's forward if that forward asks Transformers' attention interface, else None."""
    forward = _forward_of(module)
    code, scope = getattr(forward, "__code__", None), getattr(forward, "__globals__", None)
    if code is None or not isinstance(scope, dict):
        return None
    return scope if asks_the_interface(code) else None


def _forward_of(module: nn.Module) -> Any:
    """The forward that a module computes with, without the hooks of accelerate."""
    return inspect.unwrap(module.forward)


def _decoder_config(root: PreTrainedModel) -> PreTrainedConfig:
    try:
        return root.config.get_text_config(decoder=True)
    except ValueError as error:
        raise PatchError(
            f"{type(root).__name__}: its config has several decoders, patch one of them: {error}"
        ) from None


def _is_causal_self_attention(module: nn.Module, decoder: PreTrainedConfig) -> bool:
    return _is_self_attention(module, decoder) and bool(getattr(module, "is_causal", True))


def _is_self_attention(module: nn.Module, decoder: PreTrainedConfig) -> bool:
    """Whether a module is self-attention of the decoder that asks the interface."""
    of_decoder = getattr(module, "config", None) is decoder and dispatch_scope(module) is not None
    return of_decoder and not _is_cross_attention(module)


def _is_cross_attention(module: nn.Module) -> bool:
    """Whether a module attends to an image or to an encoder."""
    return "cross" in type(module).__name__.lower() or bool(getattr(module, "is_cross_attention", False))


def _layer_of(module: nn.Module) -> int | None:
    """The index of the layer that a module says it belongs to; None if it names none."""
    layer = getattr(module, "layer_idx", None)
    return layer if isinstance(layer, int) and layer >= 0 else None


# --- attention that is not reached -----------------------------------------------------------------------------------


def _unreached(root: PreTrainedModel, decoder: PreTrainedConfig, others_ask: bool) -> dict[str, nn.Module]:
    """Modules that are attention by their name and do not ask the interface.

    If others ask, a name is not enough, because linear attention has such a name too. The module must then have a layer
    and the decoder's config.
    """
    named = {name: module for name, module in root.named_modules() if _is_named_attention(module)}
    unreached = {}
    for name, module in named.items():
        is_block = any(other.startswith(f"{name}.") for other in named)
        if is_block or dispatch_scope(module) is not None or not getattr(module, "is_causal", True):
            continue
        config = getattr(module, "config", None)
        of_layer = config is decoder and _layer_of(module) is not None
        if of_layer or (not others_ask and (config is None or config is decoder)):
            unreached[name] = module
    return unreached


def _is_named_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return ("attention" in name or "attn" in name) and not _is_cross_attention(module)


def _way_in(root: PreTrainedModel, module: nn.Module) -> str:
    """What to do about a module that does not ask the interface."""
    for loader in LOADERS:
        if root.config.model_type == loader.model_type:
            return f"load it with sparse_patch.{loader.name}, which needs no remote code"
    if str(getattr(_forward_of(module), "__module__", "")).startswith(("transformers.", "torch.")):
        return "it attends by code of its own, which cannot be patched"
    return "load the model without trust_remote_code, or undo the other patch of its forward"


def _why_none(root: PreTrainedModel, decoder: PreTrainedConfig) -> str:
    """Why a model has no causal self-attention, if all of its attention asks the interface."""
    asking = [module for module in root.modules() if dispatch_scope(module) is not None]
    if not asking:
        return "has no attention: no module asks Transformers' attention interface, and none is called attention"
    if root.config.is_encoder_decoder:
        return "has an encoder; sparse_patch needs a decoder-only model"
    if not (root.can_generate() or getattr(root.config, "is_decoder", False)):
        return f"found no causal self-attention ({_name(asking[0])} is not); sparse_patch needs a decoder-only model"
    own = [module for module in asking if _is_self_attention(module, decoder)]
    if own:
        return f"found no causal self-attention: {_name(own[0])} says that it is not causal (is_causal is False)"
    return f"found no attention of its decoder: {_name(asking[0])} has another config than {type(decoder).__name__}"


def _name(module: nn.Module) -> str:
    return type(module).__name__


# --- attention that is reached and not served ------------------------------------------------------------------------


def _why_unserved(attention: dict[str, nn.Module]) -> str | None:
    """Why a patched model would not compute what the model computes; None if no reason is found."""
    layers: dict[int, str] = {}
    for name, module in attention.items():
        layer = _layer_of(module)
        if layer is None:
            said = getattr(module, "layer_idx", None)
            return (
                f"{_name(module)} does not say which layer it is of (layer_idx is {said}), as a block of several layers"
            )
        if layer in layers:
            return f"{layers[layer]} and {name} are both of layer {layer}, so layers are run in cycles or attend twice"
        layers[layer] = name
        if _asks_by_name(module):
            return f"{_name(module)} computes by the name of its attention implementation, which a patch changes"
        if _asks_for_a_tensor(module):
            return f"{_name(module)} changes its mask only if that is a tensor, and a patched model's mask is none"
    return None


def _asks_by_name(module: nn.Module) -> bool:
    """Whether a module's own code contains the name of an implementation, in addition to asking the interface."""
    if getattr(module, "reorder_and_upcast_attn", None) is False:  # GPT-2 needs the name only for this option
        return False
    return any(not _IMPLEMENTATIONS.isdisjoint(_strings(code)) for code in _codes(module))


def _codes(module: nn.Module) -> Iterator[CodeType]:
    """The code of a module's forward and of the methods of its class, without `__init__`."""
    forward = getattr(_forward_of(module), "__code__", None)
    if forward is not None:
        yield forward
    for owner in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
        for name, member in vars(owner).items():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            if code is not None and name != "__init__":
                yield code


def _strings(code: CodeType) -> Iterator[str]:
    """The strings of a function, including those in tuples, sets and inner functions."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _strings(constant)
        else:
            items = constant if isinstance(constant, tuple | frozenset) else (constant,)
            yield from (item for item in items if isinstance(item, str))


def _asks_for_a_tensor(module: nn.Module) -> bool:
    """Whether a forward calls `isinstance(mask, torch.Tensor)`."""
    code = getattr(_forward_of(module), "__code__", None)
    loaded = [str(instruction.argval) for instruction in dis.get_instructions(code)] if code is not None else []
    asked = zip(loaded, loaded[1:], loaded[2:], loaded[3:], strict=False)
    return any(name == "isinstance" and "mask" in what and "Tensor" in of for name, what, *of in asked)
