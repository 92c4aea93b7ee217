"""What a patch or a calibration may leave on a model."""

import hashlib
from typing import Any

from torch import nn

from sparse_patch.integration.names import is_hook


def marks(model: nn.Module) -> list[str]:
    """Everything that a patch leaves on a model."""
    found = [name for name, module in model.named_modules() if hasattr(module, "sparse_patch")]
    return found + [
        name
        for name, module in model.named_modules()
        if is_hook(getattr(getattr(module, "config", None), "_attn_implementation", None))
    ]


def fingerprint(model: Any) -> tuple[str, str, list[bool], bool, str]:
    """Weights, configuration, what needs gradients, and the code that runs."""
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.numpy().tobytes())
    own = sum("forward" in vars(module) for module in model.modules())
    flags = [weight.requires_grad for weight in model.parameters()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return digest.hexdigest(), model.config.to_json_string(), flags, model.training, f"{own}{hooks}"
