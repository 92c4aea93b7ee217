"""Check whether the reasons that refusals give are true for the model."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.families.layers import asks_the_interface, kind_of, layers_of


def attends(module: torch.nn.Module) -> bool:
    """Whether a module computes attention itself: through the interface, or with its own softmax."""
    if asks_the_interface(module):
        return True
    name = type(module).__name__.lower()
    if not ("attention" in name or "attn" in name) or not any(True for _ in module.children()):
        return False
    source = inspect.getsource(type(module))
    return any(word in source for word in ("softmax", "logsumexp", "scaled_dot_product_attention"))


def _all_of(model: PreTrainedModel, name: str, holds: Callable[[Any], bool]) -> bool:
    """Whether the model has modules of a class and a condition holds for all of them."""
    modules = [module for module in model.modules() if type(module).__name__ == name]
    return bool(modules) and all(holds(module) for module in modules)


def _written(pattern: str) -> Callable[[Any], bool]:
    """A check of whether the code of a module's class matches a pattern."""
    return lambda module: re.search(pattern, inspect.getsource(type(module))) is not None


Claim = Callable[[PreTrainedModel, re.Match[str]], bool]
# Claims of refusals, each with its check. The first pattern that a message contains counts.
CLAIMS: dict[str, Claim] = {
    r"trust_remote_code|other patch": lambda *_: False,  # all classes are Transformers' own, unchanged
    r"do not ask .* first \S+ \(\S+\.(\w+)\)": lambda model, says: _all_of(
        model, says[1], lambda module: not asks_the_interface(module)
    ),
    r"has no attention": lambda model, _: not any(attends(module) for module in model.modules()),
    r"decoder-only": lambda model, _: model.config.is_encoder_decoder,
    r"(\w+) says that it is not causal": lambda model, says: _all_of(model, says[1], lambda it: not it.is_causal),
    r"(\w+) has another config": lambda model, says: _all_of(
        model, says[1], lambda it: it.config is not model.config.get_text_config(decoder=True)
    ),
    r"(\w+) computes by the name": lambda model, says: _all_of(
        model, says[1], _written(r"_attn_implementation (in|not in|==|!=) ")
    ),
    r"(\w+) changes its mask only if": lambda model, says: _all_of(
        model, says[1], _written(r"isinstance\(attention_mask, torch\.Tensor\)")
    ),
    r"(\w+) does not say .*\(layer_idx is (\S+)\)": lambda model, says: _all_of(
        model,
        says[1],
        lambda it: str(it.layer_idx) == says[2] and "layer_idx" in inspect.signature(it.forward).parameters,
    ),
    r"(\S+) and (\S+) are both of layer (\d+)": lambda model, says: (
        says[1] != says[2] and {model.get_submodule(name).layer_idx for name in says.groups()[:2]} == {int(says[3])}
    ),
    r"layer (\d+) has no full attention": lambda model, says: kind_of(model, int(says[1])) != "full",
    r"every layer .* has local attention": lambda model, _: "full" not in {kind_of(model, i) for i in layers_of(model)},
    r"no layer of \d+ is left": lambda model, _: [kind_of(model, i) for i in layers_of(model)].count("full") < 2,
}


def what_is_untrue(message: str, model: PreTrainedModel) -> str | None:
    """The claim of a refusal that is not true for the model; None if it is true."""
    for pattern, holds in CLAIMS.items():
        if says := re.search(pattern, message):
            return None if holds(model, says) else f"not so: {says[0]}"
    return "nothing checks whether that is so"
