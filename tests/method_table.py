"""Every method in one table: the shared tests in `test_methods.py` run each row through the same matrix.

A new method adds a row. `small` settings select a part of a call of a few hundred tokens; `full` ones keep everything.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MethodCase:
    """Settings of one method, for the shared tests."""

    small: dict[str, Any]
    full: dict[str, Any]

    @property
    def name(self) -> str:
        parts = self.small["method"], self.small.get("selection"), "last" if self.small.get("last") else None
        return "-".join(str(part) for part in parts if part)


def _flexprefill(selection: str, **changes: Any) -> MethodCase:
    base = {"method": "flexprefill", "selection": selection, "block_size": 16, "min_length": 0}
    return MethodCase(
        small={**base, "gamma": 0.7, "tau": 0.2, "min_budget": 32, **changes},
        full={**base, "gamma": 1.0},
    )


def _minference() -> MethodCase:
    base = {"method": "minference", "block_size": 16, "min_length": 0}
    return MethodCase(
        small={**base, "vertical": 40, "slash": 104},
        full={**base, "vertical": 400, "slash": 100},
    )


def _a_shape(last: int) -> MethodCase:
    base = {"method": "a_shape", "block_size": 16, "min_length": 0, "last": last}
    return MethodCase(
        small={**base, "sink": 20, "window": 50},
        full={**base, "sink": 20, "window": 380},
    )


def _xattention(**changes: Any) -> MethodCase:
    base = {"method": "xattention", "stride": 4, "block_size": 16, "min_length": 0}
    return MethodCase(small={**base, **changes}, full={**base, "threshold": 1.0})


PREFILL_METHODS = [
    _flexprefill("reference"),
    _flexprefill("coverage", gamma=0.5, min_budget=16),
    _minference(),
    _a_shape(last=0),
    _a_shape(last=30),
    _xattention(threshold=0.7),
]
