"""Random attention calls (of `sparse_patch.testing`), and the lengths to try them at."""

from sparse_patch.testing.calls import decode_call, in_buffer, make_call, row_alone

__all__ = ["decode_call", "in_buffer", "lengths_to_test", "make_call", "row_alone"]


def lengths_to_test(block: int) -> list[int]:
    """Every length up to three blocks, and some lengths around later block edges."""
    edges = [block * k + step for k in range(4, 14, 3) for step in (-1, 0, 1)]
    return sorted({*range(1, 3 * block + 2), *edges})
