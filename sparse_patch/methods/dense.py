"""Dense attention through the hook."""

from typing import Literal

from sparse_patch.call import PHASES, AttentionCall
from sparse_patch.methods.base.protocol import Method
from sparse_patch.plans import Dense, Plan


class DenseMethod(Method):
    """Every call goes to the implementation that the model had before: the baseline, hook included."""

    phases = PHASES
    summary = "every key, through the implementation the model had before"
    paper = "none"

    method: Literal["dense"] = "dense"

    def plan(self, call: AttentionCall) -> Plan:
        return Dense("method: dense")
