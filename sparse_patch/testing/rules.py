"""What a rule is given, and how it says that it does not hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from sparse_patch.call import AttentionCall, ForwardState, Phase
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.methods.base.settings import Method
from sparse_patch.model_shape import ModelShape
from sparse_patch.ops.attention import table
from sparse_patch.plans import Dense, Plan, SparsePlan


class BrokenRule(AssertionError):
    """A method does not keep a rule.

    Attributes:
        rule: what must hold.
        seen: what was seen instead.
        cause: what usually causes it.
    """

    def __init__(self, rule: str, seen: str, cause: str) -> None:
        super().__init__(rule, seen, cause)
        self.rule, self.seen, self.cause = rule, seen, cause

    def __str__(self) -> str:
        return f"{self.rule}; but {self.seen}. Usual cause: {self.cause}."


def require(holds: bool, rule: str, seen: str, cause: str) -> None:
    """Raise BrokenRule unless a rule holds."""
    if not holds:
        raise BrokenRule(rule, seen, cause)


@dataclass(frozen=True)
class Case:
    """A method with its settings, in one phase.

    Attributes:
        method: the class.
        small: settings with which it is sparse.
        full: settings with which everything is read.
        shape: the model that it is bound to.
        phase: the phase that is tried.
    """

    method: type[Method]
    small: dict[str, Any]
    full: dict[str, Any]
    shape: ModelShape
    phase: Phase

    def bound(self, **changes: Any) -> BoundMethod:
        """The method with its small settings, on the model."""
        return self.method(**{**self.small, **changes}).bind(self.shape)

    def bound_in_full(self) -> BoundMethod:
        """The method with its full settings, on the model."""
        return self.method(**self.full).bind(self.shape)


def mask_of(plan: Plan, call: AttentionCall) -> torch.Tensor:
    """The keys that each query reads, bool `[B, Hq, Sq, Skv]`."""
    return visible(call) if isinstance(plan, Dense) else plan.mask()


def visible(call: AttentionCall) -> torch.Tensor:
    """The keys that dense attention reads, bool `[B, Hq, Sq, Skv]`."""
    key = torch.arange(call.kv_length)
    end = int(call.end())
    query = torch.arange(end - call.q.shape[2], end)
    causal = key <= query[:, None]
    real = key >= call.row_starts()[:, None]
    real_queries = query >= call.row_starts()[:, None]
    mask = causal & real[:, None] & real_queries[:, :, None]
    return mask[:, None].expand(-1, call.q.shape[1], -1, -1)


def attend(call: AttentionCall, plan: SparsePlan) -> torch.Tensor:
    """The output of a sparse plan, by the oracle of its op."""
    return table.attend(call, plan, "reference").out


def without_values(call: AttentionCall, mode: FakeTensorMode, state: ForwardState) -> AttentionCall:
    """The call with tensors that have a shape and no values, in another forward."""
    tensors: dict[str, Any] = {name: getattr(call, name) for name in ("q", "k", "v", "kv_start", "kv_end")}
    fake = {name: mode.from_tensor(tensor) for name, tensor in tensors.items() if tensor is not None}
    return replace(call, **fake, forward_state=state)  # type: ignore[arg-type]


@contextmanager
def no_host_sync() -> Iterator[FakeTensorMode]:
    """In a `with` block tensors have no values, so that whoever reads one on the host is caught.

    Raises:
        BrokenRule: a value was read.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # what a method keeps for the device has values
            yield mode
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise BrokenRule(
            "planning reads no value of a tensor on the host, because a GPU would have to wait",
            f"{error.func} does",
            ".item(), .tolist(), int(tensor), `if tensor:`, or an index by a bool tensor",
        ) from error
