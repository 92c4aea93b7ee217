"""For authors of methods: `check_method` tries a method of any package on everything that users do.

    from sparse_patch.testing import check_method
    check_method(MyMethod, small={"min_length": 0, "budget": 64}, full={"min_length": 0, "budget": 4096})

It raises `BrokenRule`, which says in plain words what does not hold. `make_call` makes attention calls for your own
tests.
"""

from sparse_patch.testing.calls import decode_call, in_buffer, make_call, row_alone
from sparse_patch.testing.check import BrokenRule, check_method

__all__ = ["BrokenRule", "check_method", "decode_call", "in_buffer", "make_call", "row_alone"]
