"""How many pages tokens lie in."""


def num_pages(tokens: int, page_size: int, offset: int) -> int:
    """Pages of a row of so many tokens."""
    return max(0, -(-(tokens - offset) // page_size))


def pages_of(tokens: int, page_size: int) -> int:
    """Most pages that so many tokens in a row can lie in."""
    return (tokens + page_size - 2) // page_size + 1
