"""Discovery."""

import inspect
from typing import Any

from torch import nn


def dispatch_scope(module: nn.Module) -> dict[str, Any] | None:
    """The globals of the module's forward if that forward asks Transformers' attention interface, else None."""
    forward = inspect.unwrap(module.forward)  # past the hooks of accelerate
    code, scope = getattr(forward, "__code__", None), getattr(forward, "__globals__", None)
    if code is None or not isinstance(scope, dict):
        return None
    return scope if {"ALL_ATTENTION_FUNCTIONS", "_attn_implementation"} <= set(code.co_names) else None
