"""What several Triton kernels have in common; it is compiled into each kernel that calls it."""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634  # brings logits to log2 units, in which an exponential is one instruction


@triton.jit
def softcap_logits(s, scale, softcap):
    """`softcap * tanh(scale * s / softcap)`, with a sigmoid: tanh(x) = 2 sigmoid(2x) - 1."""
    return softcap * (2.0 * tl.sigmoid(s * (2.0 * scale / softcap)) - 1.0)


@triton.jit
def add_to_exp_sum(m_i, l_i, s):
    """Online log-sum-exp of rows with one more tile `s`, in log2 units: maximum, and sum of `2 ** (s - maximum)`.

    A row may be `-inf` all along: then its sum stays 0.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1))
    shift = tl.where(m_new == -float("inf"), 0.0, m_new)
    return m_new, l_i * tl.math.exp2(m_i - shift) + tl.sum(tl.math.exp2(s - shift[:, None]), 1)


@triton.jit
def query_blocks_of_row(row_starts, q_start, keys, i_b, SIDE: tl.constexpr):
    """The grid index of a row's first query block, and how many a row has."""
    start = tl.load(row_starts + i_b).to(tl.int32)
    first = tl.maximum(q_start - start, 0) // SIDE
    return first, tl.cdiv(keys - start, SIDE) - first
