"""The tiles that plans with a `pv_threshold` leave out."""

_SIDE = 64  # the least that the tensor cores of Hopper multiply at once


def tile_side(block_size: int) -> int:
    """Queries, and keys, of a tile; a block is one tile or several."""
    return min(_SIDE, block_size)
