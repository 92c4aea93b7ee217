"""What a graph relies on in a model and in PyTorch, and whether it is still so.

A replay runs no Python, so whatever Python would have read must be as it was. Values that weights are given in place
need no check: a graph reads them where they are.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_patch.integration.hook import join_forward
from sparse_patch.integration.step import NotAStep

_DEPTH = 2  # how far objects in the attributes of modules are followed: a config, and a config in it
_CONTAINERS = (dict, list, tuple, set)
_FOR_STEPS = {"training", "_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"}
_NOT_FOR_STEPS = vars(nn.Module()).keys() - _FOR_STEPS  # hooks of training and of checkpoints


class ModelState:
    """Every attribute of every module and of the objects in these (configs), and the place of every tensor.

    The comparison comes before every replay, so it is made of a few calls that loop in C. It takes some 0.15 ms for a
    model of 32 layers.

    Attributes:
        refusal: why no graph can serve the model; None if one can.
    """

    def __init__(self, root: PreTrainedModel) -> None:
        self.refusal = _why_refused(root)
        self._modules = list(root.modules())
        self._holders = list(_holders(self._modules))
        self._values = list(map(dict, self._holders))
        kept = [
            value
            for holder in self._holders
            for name, value in holder.items()
            if isinstance(value, dict | list | set) and name not in _NOT_FOR_STEPS
        ]
        self._empty = [container for container in kept if not container]
        self._filled = [container for container in kept if container]
        self._contents = [_copied(container) for container in self._filled]
        self._tensors = [*root.parameters(), *root.buffers()]
        self._places = self._places_now()
        self._classes = list(map(type, self._modules))
        self._different: list[Any] = list(dict.fromkeys(self._classes))
        self._forwards = [kind.forward for kind in self._different]

    def holds(self) -> bool:
        """Whether the model is as it was."""
        try:  # comparisons look at identity first
            same = self._holders == self._values and self._filled == self._contents
        except RuntimeError:  # other tensors than before cannot be compared
            return False
        return (
            same
            and not any(self._empty)
            and self._places_now() == self._places
            and list(map(type, self._modules)) == self._classes
            and [kind.forward for kind in self._different] == self._forwards
        )

    def _places_now(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._tensors))


def torch_state() -> tuple[Any, ...]:
    """The settings of PyTorch that decide what a step launches.

    Raises:
        NotAStep: gradients are recorded, autocast is on, or operators are intercepted.
    """
    if torch.is_grad_enabled():
        raise NotAStep("gradients are enabled (torch.no_grad or torch.inference_mode)")
    if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
        raise NotAStep("autocast, whose weights are copies that do not last")
    if torch._C._len_torch_dispatch_stack() or not _only_devices(torch.overrides._get_current_function_mode_stack()):
        raise NotAStep("a mode of PyTorch that sees every operator")
    if nn.modules.module._has_any_global_hook():
        raise NotAStep("hooks on all modules")
    matmul = torch.backends.cuda.matmul
    return (
        torch.get_float32_matmul_precision(),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
    )


def _why_refused(root: PreTrainedModel) -> str | None:
    """Why a forward of a model does more than launch kernels on one device; None if it does not."""
    for name, module in root.named_modules():
        place = name or type(root).__name__
        if module.training:
            return f"{place} is in training mode"
        if hasattr(module, "_hf_hook"):
            return f"{place} has a hook of accelerate (offloaded or sharded layers)"
        if module is not root and _has_hooks(module):
            return f"{place} has a forward hook"
    device = next(root.parameters()).device
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.device != device:
            return f"{name} is on {tensor.device}, other weights on {device}"
    return None


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks other than ours."""
    ours = all(hook is join_forward for hook in module._forward_pre_hooks.values())
    return bool(module._forward_hooks) or not ours


def _only_devices(modes: list[Any]) -> bool:
    """Whether all modes only choose the device of new tensors (`torch.set_default_device`)."""
    return all(type(mode).__name__ == "DeviceContext" for mode in modes)


def _holders(modules: list[nn.Module]) -> Iterator[dict[str, Any]]:
    """The attributes of modules, and of the objects in these, each once."""
    seen: set[int] = set()
    level: list[Any] = list(modules)
    for _ in range(_DEPTH + 1):
        deeper = []
        for owner in level:
            if id(owner) in seen:
                continue
            seen.add(id(owner))
            yield vars(owner)
            deeper += [inner for value in vars(owner).values() for inner in _inside(value) if _is_object(inner)]
        level = deeper


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, _CONTAINERS):
        yield value
        return
    for inner in value:
        yield from _inside(inner)


def _is_object(value: Any) -> bool:
    """Whether a value's attributes are worth a look: neither a tensor or a module nor part of the patch."""
    if not hasattr(value, "__dict__") or isinstance(value, torch.Tensor | nn.Module | type) or callable(value):
        return False
    return not type(value).__module__.startswith("sparse_patch.")


def _copied(value: Any) -> Any:
    """Containers copied, deeply; everything else as it is."""
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(map(_copied, value))
    return value
