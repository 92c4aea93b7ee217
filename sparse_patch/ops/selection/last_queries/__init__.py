"""Where the last queries of a call look: what vertical-slash methods choose from."""

from torch import Tensor

from sparse_patch.call import AttentionCall
from sparse_patch.ops.backends import fastest


def last_query_profiles(call: AttentionCall, queries: int) -> tuple[Tensor, Tensor]:
    """Mean attention of the last `queries` queries by key and by distance, float32 `[B, Hq, Skv]` each, sums of 1.

    By key: indexed by position in the buffer, padding 0. By distance: entry `o` sums the attention to the key `o` back.
    Every row must have at least `queries` real tokens for its profile to mean anything; `queries` is a power of two
    from 16 to 128.
    """
    if fastest(call) == "triton":
        from sparse_patch.ops.selection.last_queries.triton import last_query_profiles as profiles
    else:
        from sparse_patch.ops.selection.last_queries.torch import last_query_profiles as profiles
    return profiles(call, queries)
