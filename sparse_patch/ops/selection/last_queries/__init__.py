"""Where the last queries of a call look: vertical-slash methods choose from this."""

from torch import Tensor

from sparse_patch.call import AttentionCall
from sparse_patch.ops.backends import fastest


def last_query_profiles(call: AttentionCall, queries: int) -> tuple[Tensor, Tensor]:
    """Mean attention of the last `queries` queries by key and by distance, float32 `[B, Hq, Skv]` each, with sum 1.

    By key: indexed by position in the buffer; padding is 0. By distance: entry `o` sums the attention to the key `o`
    positions back. The profile of a row is valid only if the row has at least `queries` real tokens. `queries` is a
    power of two from 16 to 128.
    """
    if fastest(call) == "triton":
        from sparse_patch.ops.selection.last_queries.triton import last_query_profiles as profiles
    else:
        from sparse_patch.ops.selection.last_queries.torch import last_query_profiles as profiles
    return profiles(call, queries)
