"""`check_method`: the rules that hold for every method, on calls made by hand and on a small model."""

from collections.abc import Mapping
from typing import Any

from sparse_patch.call import PHASES
from sparse_patch.config import load_config
from sparse_patch.errors import ConfigError, reason
from sparse_patch.methods.base.registry import find_method, register_method
from sparse_patch.methods.base.settings import Method
from sparse_patch.model_shape import ModelShape
from sparse_patch.testing import decode_rules, model_rules, prefill_rules
from sparse_patch.testing.rules import BrokenRule, Case, require

__all__ = ["SMALL_MODEL", "BrokenRule", "check_method"]

SMALL_MODEL = ModelShape("llama", num_layers=5, num_heads=4, num_kv_heads=2, hidden_size=64)


def check_method(
    method: type[Method],
    *,
    small: Mapping[str, Any],
    full: Mapping[str, Any],
    shape: ModelShape = SMALL_MODEL,
) -> list[str]:
    """Try a method on what users do: batches with padding, chunks, short prompts, caches of both kinds, a model.

    Args:
        method: the class, from anywhere. It is registered if it is not.
        small: settings with which it is sparse on calls of 300 to 400 tokens, of heads of 16 dimensions.
        full: settings with which everything is read.
        shape: the model that it is bound to; a small Llama of these sizes is run.

    Returns:
        The rules that hold, in the order in which they were tried.

    Raises:
        BrokenRule: a rule does not hold; the message says which one, what was seen, and what usually causes it.
    """
    _register(method)
    held: list[str] = []
    for settings in (small, full):
        held += _check_settings(method, settings)
    for phase in PHASES:
        if phase in method.phases:
            case = Case(method, dict(small), dict(full), shape, phase)
            rules = prefill_rules.RULES if phase == "prefill" else decode_rules.RULES
            for rule in (*rules, *model_rules.RULES):
                rule(case)
                held.append(f"{phase}: {rule.__name__.replace('_', ' ')}")
    return list(dict.fromkeys(held))


def _register(method: type[Method]) -> None:
    try:
        if find_method(method.registered_name()) is not method:
            register_method(method)
    except ConfigError as error:
        raise BrokenRule(
            "a method is a class that can be registered", str(error), "the message says what to add"
        ) from None


def _check_settings(method: type[Method], settings: Mapping[str, Any]) -> list[str]:
    """YAML, dicts and Python make the same settings of the same fields."""
    name = method.registered_name()
    rule = "settings are plain values that a YAML file can hold"
    try:
        made = method(**settings)
        config = load_config({phase: {"method": name, **settings} for phase in method.phases})
        again = load_config(config.settings())
    except (ConfigError, TypeError, ValueError) as error:
        raise BrokenRule(rule, reason(error), "each field has a type of pydantic and a default") from error
    require(
        all(config.method(phase) == again.method(phase) == made for phase in method.phases),
        rule,
        f"{name} read from its own YAML is another one",
        "a validator that changes settings, or a field that pydantic does not write",
    )
    without_default = [key for key, field in method.model_fields.items() if field.is_required()]
    of_defaults = "every field has a default"
    require(not without_default, of_defaults, f"{', '.join(without_default)} has none", "no `= value` after its type")
    return [rule, of_defaults]
