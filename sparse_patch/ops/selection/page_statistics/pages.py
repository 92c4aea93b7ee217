"""The number of pages that tokens lie in."""


def num_pages(tokens: int, page_size: int, offset: int) -> int:
    """Number of pages of a row of `tokens` tokens."""
    return max(0, -(-(tokens - offset) // page_size))


def pages_of(tokens: int, page_size: int) -> int:
    """The most pages that `tokens` consecutive tokens can lie in."""
    return (tokens + page_size - 2) // page_size + 1
