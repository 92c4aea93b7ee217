"""Plans: the decisions of methods, as data. A plan owns no kernel and knows no method.

Every plan has `density()`, the share of the causal triangle it computes (padding excluded from both sides). So methods,
tests, the report, the pictures and the benchmarks all use the same definition.
"""

from sparse_patch.plans.blocks import BlockPlan
from sparse_patch.plans.grid import BlockGrid
from sparse_patch.plans.lists import leading, marked
from sparse_patch.plans.pages import PagePlan
from sparse_patch.plans.plan import Dense, PairsInWaiting, Plan, SparsePlan
from sparse_patch.plans.spans import (
    GrowingWindow,
    SpanPlan,
    Window,
    check_spans,
    in_span,
    spans_of,
    widest,
    window_parameters,
)
from sparse_patch.plans.token_blocks import BLOCK_BITS, TokenBlockPlan, listable_blocks

__all__ = [
    "BLOCK_BITS",
    "BlockGrid",
    "BlockPlan",
    "Dense",
    "GrowingWindow",
    "PagePlan",
    "PairsInWaiting",
    "Plan",
    "SpanPlan",
    "SparsePlan",
    "TokenBlockPlan",
    "Window",
    "check_spans",
    "in_span",
    "leading",
    "listable_blocks",
    "marked",
    "spans_of",
    "widest",
    "window_parameters",
]
