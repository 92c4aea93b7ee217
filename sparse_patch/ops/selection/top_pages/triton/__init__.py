"""Triton kernels of the lists of pages."""

from sparse_patch.ops.selection.top_pages.triton.lists import select_pages, top_pages, why_unsupported

__all__ = ["select_pages", "top_pages", "why_unsupported"]
