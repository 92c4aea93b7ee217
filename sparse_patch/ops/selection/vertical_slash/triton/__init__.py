"""Triton backend of the lines: `choose` takes lines, `cut` finds the blocks of query-aware heads, `plan` lists both."""

from sparse_patch.ops.selection.vertical_slash.triton.choose import choose_vertical_slash
from sparse_patch.ops.selection.vertical_slash.triton.plan import plan_of_vertical_slash
from sparse_patch.ops.selection.vertical_slash.triton.search import tokens_within

__all__ = ["choose_vertical_slash", "plan_of_vertical_slash", "tokens_within"]
