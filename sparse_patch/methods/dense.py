"""Dense attention through the hook."""

from typing import Literal

from sparse_patch.call import PHASES, AttentionCall
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.methods.base.settings import Method
from sparse_patch.model_shape import ModelShape
from sparse_patch.plans import Dense, Plan


class DenseMethod(Method):
    """The baseline: every call goes through the hook to the implementation that the model had before."""

    phases = PHASES
    summary = "every key, through the implementation the model had before"
    paper = "none"

    method: Literal["dense"] = "dense"

    def bind(self, shape: ModelShape) -> BoundMethod:
        """See `Method.bind`."""
        return BoundDense(self)


class BoundDense(BoundMethod):
    """Dense attention on any model."""

    def __init__(self, settings: DenseMethod) -> None:
        self.settings = settings

    def plan(self, call: AttentionCall) -> Plan:
        """See `BoundMethod.plan`."""
        return Dense("method: dense")
