"""The scores of pages as numbers, and the search for a number that some of them reach; compiled into kernels."""

import triton
import triton.language as tl

from sparse_patch.kernels.pieces import rising

LEAST: tl.constexpr = tl.constexpr(-0x80000000)  # below the number of every score
_LOWEST: tl.constexpr = tl.constexpr(-0x7F800001)  # the number of -inf
_HIGHEST: tl.constexpr = tl.constexpr(0x7F800000)  # the number of +inf
_MOST: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_GUESSES: tl.constexpr = tl.constexpr(12)


@triton.jit
def pages_of_list(limits, limit_strides, i_b, i_l, size, page_size, spared):
    """The number of real pages of a list."""
    stride_b, stride_l = limit_strides
    limit = tl.load(limits + i_b * stride_b + i_l * stride_l) - spared
    return tl.minimum(tl.maximum(tl.cdiv(limit, page_size), 0), size).to(tl.int32)


@triton.jit
def scores_of(p_scores, stride_n, page, there, real, first, last):
    """The scores of pages; -inf instead of NaN, and +inf for the first and the last pages.

    Pages that are `there` can be read; a mask that may end anywhere forbids wide loads, so it has more than the real
    pages. What is given for pages that are not real has no meaning.
    """
    score = tl.load(p_scores + page.to(tl.int64) * stride_n, mask=there, other=-float("inf"))
    score = tl.where(score == score, score, -float("inf"))
    return tl.where((page < first) | (page >= real - last), float("inf"), score)


@triton.jit
def keys_of(p_scores, stride_n, page, there, real, first, last):
    """The scores of pages as `rising` numbers, as for `scores_of`; `LEAST` for a page that is not real."""
    score = scores_of(p_scores, stride_n, page, there, real, first, last)
    return tl.where(there & (page < real), rising(score), LEAST)


@triton.jit
def score_of(key):
    """The score that has a `rising` number."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def halfway(low, high):
    """The mean of two numbers, rounded up, without overflow."""
    return (low | high) - ((low ^ high) >> 1)


@triton.jit
def bisect(key, low, high, fewest, most):
    """A number from `low` to `high` that `fewest` to `most` keys reach, if there is one, else the largest that
    `fewest` reach."""
    while low < high:
        middle = halfway(low, high)
        reached = tl.sum((key >= middle).to(tl.int32), 0)
        low = tl.where(reached >= fewest, middle, low)
        high = tl.where(reached > most, high, tl.where(reached >= fewest, middle, middle - 1))
    return low


@triton.jit
def _height(number):
    """A number that grows much like the logarithm of a count: the bits of a float."""
    return tl.maximum(number.to(tl.float32), 0.5).to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def floor_of(key, number, fewest, most):
    """A number that `fewest` to `most` of the keys reach, if the bits allow it, else the largest that `fewest` reach.

    The logarithm of how many keys reach a score falls much like a line, so the search guesses where the line has the
    wanted number, and halves the height of an end that stays where it is (the Illinois method). After some guesses it
    bisects, so no scores make it long.

    Args:
        key: int32 `[BLOCK]`, at least `fewest` of them above `LEAST`.
        number: how many of them are above `LEAST`, roughly.
    """
    low, high = tl.full([], _LOWEST, dtype=tl.int32), tl.full([], _MOST, dtype=tl.int32)
    top = tl.max(tl.where(key < _HIGHEST, key, LEAST), 0)
    left = score_of(tl.min(tl.where(key > _LOWEST, key, _MOST), 0))  # ends of the line: the scores, and
    right = score_of(top)
    wanted = _height((fewest + most) / 2)
    over = _height(number) - wanted  # by how much the ends are over and under it
    under = _height(tl.sum((key >= top).to(tl.int32), 0)) - wanted
    guesses, side = 0, 0
    while (low < high) & (guesses < _GUESSES):
        share = over / tl.maximum(over - under, 1.0)
        score = left * (1 - share) + right * share
        middle = tl.minimum(tl.maximum(rising(score), low + 1), high)
        reached = tl.sum((key >= middle).to(tl.int32), 0)
        height = _height(reached) - wanted
        enough = reached >= fewest
        under = tl.where(enough, tl.where(side == 1, under / 2, under), height)
        over = tl.where(enough, height, tl.where(side == -1, over / 2, over))
        left = tl.where(enough, score_of(middle), left)
        right = tl.where(enough, right, score_of(middle))
        low = tl.where(enough, middle, low)
        high = tl.where(reached > most, high, tl.where(enough, middle, middle - 1))
        side = tl.where(enough, 1, -1)
        guesses += 1
    return bisect(key, low, high, fewest, most)
