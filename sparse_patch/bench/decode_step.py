"""One decode step through a method: of one layer, and of all layers."""

from collections.abc import Sequence
from dataclasses import replace

from sparse_patch.call import AttentionCall, ForwardState
from sparse_patch.config import BoundConfig
from sparse_patch.integration.hook import decode_step
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.ops.attention import table
from sparse_patch.plans import Dense, PagePlan


def run_layer(config: BoundConfig, call: AttentionCall) -> PagePlan:
    """Run one decode call through a method as the hook does, and return the plan of what it read.

    Raises:
        UnsupportedCallError: the backend of the configuration cannot serve the call.
    """
    method = method_of(config)
    method.remember(call)
    plan = method.plan(call)
    if isinstance(plan, Dense):
        plan = PagePlan.every(call)
    assert isinstance(plan, PagePlan), "a decode method plans pages"
    decode_step(call, plan, method, config.settings.backend)
    return plan


def run_stack(config: BoundConfig, calls: Sequence[AttentionCall]) -> list[PagePlan]:
    """Run one step of all layers as one forward does, and return each layer's plan."""
    forward_state: ForwardState = {}
    used = config.settings.layers("decode", len(calls))
    plans = []
    for call in calls:
        if call.layer in used:
            plans.append(run_layer(config, replace(call, forward_state=forward_state)))
        else:
            plans.append(PagePlan.every(call))
            table.attend(call, plans[-1], config.settings.backend)
    return plans


def method_of(config: BoundConfig) -> BoundMethod:
    """The decode method of a configuration from `methods_of`."""
    assert config.decode is not None, "checked by methods_of"
    return config.decode
