"""Triton backend of the lines: `choose` takes lines, `cut` the blocks of query-aware heads, `plan` lists both."""

from sparse_patch.ops.lines.triton.choose import choose_lines
from sparse_patch.ops.lines.triton.plan import plan_of_lines
from sparse_patch.ops.lines.triton.search import tokens_within

__all__ = ["choose_lines", "plan_of_lines", "tokens_within"]
