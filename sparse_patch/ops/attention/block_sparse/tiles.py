"""The tiles that plans with a `pv_threshold` leave out."""

_SIDE = 64  # the fewest rows that Hopper's tensor cores multiply at once


def tile_side(block_size: int) -> int:
    """Number of queries, and of keys, of a tile. A block is one tile or several."""
    return min(_SIDE, block_size)
