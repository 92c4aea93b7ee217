"""The largest entries of a row that make up a mass, without a sort.

The search goes over the bits of the float at which to cut, with four candidates per step. Floats that are not negative
have the same order as their bits.
"""

import torch
import triton
import triton.language as tl

from sparse_patch.kernels.jit import jit
from sparse_patch.kernels.launch import launch_op


def _outputs(mass: torch.Tensor) -> torch.Tensor:
    return torch.empty(mass.shape[:-1], dtype=torch.int64, device=mass.device)


@launch_op("tokens_within", _outputs)
def tokens_within(mass: torch.Tensor, gamma: float) -> torch.Tensor:
    """1 + how many of the largest entries of `mass` `[..., n]`, all in [0, 2), have a sum of at most `gamma`, int64."""
    rows = mass.reshape(-1, mass.shape[-1]).contiguous()
    counts = _outputs(mass)
    block = min(16384, triton.next_power_of_2(rows.shape[1]))
    _count_kernel[(len(rows),)](rows, counts, gamma, rows.shape[1], BLOCK=block, num_warps=warps_of(block))
    return counts


def warps_of(block: int) -> int:
    """Warps of a program that holds a block of entries; known to torch.compile for any length of a prompt."""
    return next((warps for warps in (32, 16, 8) if block >= 512 * warps), 4)


@triton.jit
def _enough(mass, number, limit, most, REACH: tl.constexpr, LIMITED: tl.constexpr):
    """1 if these entries are enough: their sum reaches the limit (or there are `most` entries), or is above it."""
    total = tl.sum(mass, 0)
    if REACH:
        enough = total >= limit
        if LIMITED:
            enough = enough | (tl.sum(number, 0) >= most)
    else:
        enough = total > limit
    return enough.to(tl.int32)


@triton.jit
def search(p_x, n, limit, most, REACH: tl.constexpr, LIMITED: tl.constexpr, BLOCK: tl.constexpr):
    """The largest bits such that the entries with at least these are enough. Entries lie in [0, 2); all are enough."""
    found = 0
    for step in tl.range(0, 15):
        digit = 1 << (28 - 2 * step)
        mass_1 = tl.zeros([BLOCK], dtype=tl.float32)  # [BLOCK]
        mass_2 = tl.zeros([BLOCK], dtype=tl.float32)  # [BLOCK]
        mass_3 = tl.zeros([BLOCK], dtype=tl.float32)  # [BLOCK]
        number_1 = tl.zeros([BLOCK], dtype=tl.int32)  # [BLOCK]
        number_2 = tl.zeros([BLOCK], dtype=tl.int32)  # [BLOCK]
        number_3 = tl.zeros([BLOCK], dtype=tl.int32)  # [BLOCK]
        for i in tl.range(0, n, BLOCK):
            offs = i + tl.arange(0, BLOCK)  # [BLOCK]
            x = tl.load(p_x + offs, mask=offs < n, other=0.0)  # [BLOCK]
            above = x.to(tl.int32, bitcast=True) - found  # [BLOCK]
            mass_1 += tl.where(above >= digit, x, 0.0)
            mass_2 += tl.where(above >= 2 * digit, x, 0.0)
            mass_3 += tl.where(above >= 3 * digit, x, 0.0)
            if LIMITED:
                number_1 += (above >= digit).to(tl.int32)
                number_2 += (above >= 2 * digit).to(tl.int32)
                number_3 += (above >= 3 * digit).to(tl.int32)
        digits = _enough(mass_1, number_1, limit, most, REACH, LIMITED)
        digits += _enough(mass_2, number_2, limit, most, REACH, LIMITED)
        digits += _enough(mass_3, number_3, limit, most, REACH, LIMITED)
        found += digit * digits
    return found


@jit(["n"])
def _count_kernel(x, counts, gamma, n, BLOCK: tl.constexpr):
    """`tokens_within` of one row."""
    pid = tl.program_id(0)
    p_x = x + pid.to(tl.int64) * n
    cut = search(p_x, n, gamma, 0, False, False, BLOCK)
    above = tl.zeros([BLOCK], dtype=tl.int32)  # [BLOCK]
    mass = tl.zeros([BLOCK], dtype=tl.float32)  # [BLOCK]
    for i in tl.range(0, n, BLOCK):
        offs = i + tl.arange(0, BLOCK)  # [BLOCK]
        b_x = tl.load(p_x + offs, mask=offs < n, other=0.0)  # [BLOCK]
        taken = (b_x.to(tl.int32, bitcast=True) > cut) & (offs < n)  # [BLOCK]
        above += taken.to(tl.int32)
        mass += tl.where(taken, b_x, 0.0)
    # Of the entries that equal the cut, as many as still fit; not all do, or the cut would be lower.
    value = tl.maximum(cut, 1).to(tl.float32, bitcast=True)
    ties = tl.where(cut > 0, ((gamma - tl.sum(mass, 0)) / value).to(tl.int32), 0)
    tl.store(counts + pid, (tl.sum(above, 0) + tl.maximum(ties, 0) + 1).to(tl.int64))
