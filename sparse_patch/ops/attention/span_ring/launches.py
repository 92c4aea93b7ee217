"""What the launches of the ring's kernels need beside tensors, once for a layout or for a shape of calls."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton

from sparse_patch.kernels.launch import attention_constants, block_of, gpu_properties
from sparse_patch.ops.attention.page_decode.triton import tile_of
from sparse_patch.ops.attention.span.triton import by_head, grows
from sparse_patch.ops.attention.span_ring.ring import first_slots

_MOST_SPLITS = 128  # splits per head; the second kernel merges them at once
_LEAST_PIECE = 256  # slots; with fewer, a program has too little work


@lru_cache(maxsize=1024)
def launch_of(
    sizes: tuple[int, ...],
    keys: tuple[tuple[int, ...], ...],
    flags: tuple[bool, bool],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[tuple[int], int, int, torch.Tensor, dict[str, Any]]:
    """The grid, the splits, the slots of a split, the pieces and the constants of a launch, once for a shape of calls.

    Args:
        sizes: batch, Hq, Sq, D and Dv.
        keys: sinks, windows and capacities.
        flags: whether there are a softcap, and keys that are not in the ring.
    """
    batch, heads, q_length, head_dim, value_dim = sizes
    sinks, windows, capacities = keys
    has_softcap, has_own = flags
    group = heads // len(sinks)
    rows = group * q_length
    block_m = 16 if dtype == torch.float32 else min(64, block_of(rows))
    tile = tile_of(max(head_dim, value_dim), dtype.itemsize, gpu_properties(device)[1])
    piece = max(capacities) if has_own else piece_of(capacities)
    splits = triton.cdiv(max(capacities), piece)
    work = pieces_of(sinks, windows, capacities, piece, device)
    constants = {
        **attention_constants(head_dim, value_dim, dtype, has_softcap),
        "BLOCK_M": block_m,
        "BLOCK_N": tile.block_n,
        "GROUP": group,
        "HAS_OWN": has_own,
        "GROWS": grows(windows),
        "SPLIT": splits > 1,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return (len(work) * batch * triton.cdiv(rows, block_m),), splits, piece, work, constants


@lru_cache(maxsize=1024)
def pieces_of(
    sinks: tuple[int, ...],
    windows: tuple[int, ...],
    capacities: tuple[int, ...],
    piece: int,
    device: torch.device,
) -> torch.Tensor:
    """The pieces of all heads, largest heads first: piece, head and the head's numbers, int64 `[pieces, 9]`."""
    heads = zip(range(len(sinks)), sinks, capacities, first_slots(capacities), by_head(windows), strict=True)
    largest_first = sorted(heads, key=lambda head: -head[2])
    pieces = [(i, *head, *window) for *head, window in largest_first for i in range(triton.cdiv(head[2], piece))]
    return torch.tensor(pieces, dtype=torch.int64, device=device)


@lru_cache(maxsize=1024)
def heads_of(sinks: tuple[int, ...], capacities: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Sink, capacity and first slot of each KV head, int32 `[Hkv, 3]`; cached like spans in `attention.span.triton`."""
    heads = list(zip(sinks, capacities, first_slots(capacities), strict=True))
    return torch.tensor(heads, dtype=torch.int32, device=device)


def piece_of(capacities: Sequence[int]) -> int:
    """The most slots that a program reads for one token."""
    return max(_LEAST_PIECE, triton.next_power_of_2(triton.cdiv(max(capacities), _MOST_SPLITS)))
