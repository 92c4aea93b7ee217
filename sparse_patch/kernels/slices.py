"""Cutting work into slices, so that temporaries stay small whatever the length of the prompt."""

from collections.abc import Iterator

SLICE_BYTES = 32 << 20


def slices(length: int, bytes_each: int, step: int = 1, limit: int | None = None) -> Iterator[slice]:
    """Slices that cover `range(length)`, each of about `limit` bytes (`SLICE_BYTES`) at `bytes_each` bytes an item.

    A slice is one or more whole steps if a `step` (a power of two) fits. Otherwise it is a power of two of items, at
    least one, so that no slice crosses a multiple of `step`.
    """
    fit = max(1, (SLICE_BYTES if limit is None else limit) // bytes_each)
    at_once = fit - fit % step if fit >= step else 1 << (fit.bit_length() - 1)
    for begin in range(0, length, at_once):
        yield slice(begin, min(begin + at_once, length))
