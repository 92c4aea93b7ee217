"""What several Triton kernels have in common: pieces that are compiled into them, and what their launches need."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
import triton
import triton.language as tl

from sparse_patch.ops.alignment import STEP, is_aligned

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
LOG2_E = 1.4426950408889634  # brings logits to log2 units, in which an exponential is one instruction
LOWEST = -3.4028234e38  # a running maximum of no key yet that can be subtracted from -inf


class LaunchOp(Protocol[P, R_co]):
    """What `launch_op` makes of a launch.

    Attributes:
        op: the custom op.
        register_fake: of the op.
    """

    op: Any
    register_fake: Callable[[Callable[..., Any]], Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def launch_op(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable[P, R_co]], LaunchOp[P, R_co]]:
    """A kernel's launch as a custom op `sparse_patch::name`, where torch.compile or a fake tensor has to know one.

    Eager calls go past the op, whose wrapper takes as long on the host as the launch. The first argument is a tensor.
    """

    def decorate(launch: Callable[P, R_co]) -> LaunchOp[P, R_co]:
        op = torch.library.custom_op(f"sparse_patch::{name}", launch, mutates_args=mutates_args)

        @wraps(launch)
        def call(x: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
                return op(x, *args, **kwargs)
            return cast(Any, launch)(x, *args, **kwargs)

        made = cast(Any, call)
        made.op, made.register_fake = op, op.register_fake
        return cast(LaunchOp[P, R_co], made)

    return decorate


@dataclass(frozen=True)
class Tile:
    """How the kernel is cut: queries and keys of a tile, warps of a program, depth of its pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tile_of(head_dim: int, dtype: torch.dtype, block_size: int, capability: tuple[int, int]) -> Tile:
    """The tile for a head size, dtype and GPU generation; static, so that no prompt length waits for a search."""
    wide = head_dim > 128
    if dtype == torch.float32:
        tile = Tile(64, 32, 4, 1)
    elif capability >= (9, 0):
        tile = Tile(128, 64, 8, 2) if wide else Tile(64, 64, 4, 3) if head_dim > 64 else Tile(64, 128, 4, 2)
    elif capability == (8, 0):
        tile = Tile(64, 64, 4, 2) if wide else Tile(128, 64, 8, 3)
    else:  # about 100 KB of shared memory
        tile = Tile(64, 32, 4, 2) if wide else Tile(64, 64, 4, 2)
    return Tile(min(tile.block_m, block_size), min(tile.block_n, block_size), tile.num_warps, tile.num_stages)


@cache
def gpu(device: torch.device) -> tuple[int, tuple[int, int]]:
    """Number of SMs and compute capability; of a small GPU where the interpreter runs."""
    if device.type != "cuda":
        return 4, (9, 0)
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)


def rows_in_one_piece(x: torch.Tensor) -> torch.Tensor:
    """A tensor whose last stride is 1: itself, or a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def copyable(x: torch.Tensor) -> torch.Tensor:
    """A tensor that a tensor descriptor can describe: itself, or a copy with room behind each row."""
    if is_aligned(x):
        return x
    steps = STEP // x.element_size()
    room = x.new_empty(*x.shape[:-1], -(-x.shape[-1] // steps) * steps)
    return room[..., : x.shape[-1]].copy_(x)


def by_row(numbers: torch.Tensor | None, instead: torch.Tensor) -> torch.Tensor:
    """Numbers of the rows, `[B]`, one after the other; `instead`, of which nothing is read, if there are none."""
    return instead if numbers is None else numbers.contiguous()


def attention_outputs(
    q: torch.Tensor, v: torch.Tensor, return_lse: bool, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for an output `[B, Hq, Sq, Dv]`, in memory as `[B, Sq, Hq, Dv]`, and its LSE, empty if not asked for."""
    batch, heads, q_length, _ = q.shape
    out = q.new_empty(batch, q_length, heads, v.shape[-1], dtype=dtype or q.dtype).transpose(1, 2)
    return out, q.new_empty((batch, heads, q_length) if return_lse else (0,), dtype=torch.float32)


@triton.jit
def softcap_logits(s, scale, softcap):
    """`softcap * tanh(scale * s / softcap)`, with a sigmoid: tanh(x) = 2 sigmoid(2x) - 1."""
    return softcap * (2.0 * tl.sigmoid(s * (2.0 * scale / softcap)) - 1.0)


@triton.jit
def tile_logits(q, k_tile, softcap, HAS_SOFTCAP: tl.constexpr, scale, PRECISION: tl.constexpr):
    """Logits of a tile, in units that `add_tile` multiplies by its scale."""
    s = tl.dot(q, k_tile, input_precision=PRECISION)
    if HAS_SOFTCAP:
        s = softcap_logits(s, scale, softcap)
    return s


@triton.jit
def add_tile(s, v_tile, acc, m_i, l_i, to_log2, PRECISION: tl.constexpr):
    """Online softmax: one more tile of logits and values. `to_log2` brings the logits to log2 units.

    The maximum `m_i` of a row that has no key yet is `LOWEST`; `-inf` will do before a tile in which it sees one.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1) * to_log2)
    p = tl.math.exp2(s * to_log2 - m_new[:, None])
    alpha = tl.math.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, l_i


@triton.jit
def add_split_tile(s, v_tile, acc, m_i, l_i, PRECISION: tl.constexpr):
    """Online softmax of few queries: one more tile of logits, in log2 units, and values.

    A row may have no key at all. Its sum is spread over the columns of `l_i`: a sum over warps costs a barrier.
    """
    m_new = tl.maximum(m_i, tl.max(s, 1))
    base = tl.where(m_new == -float("inf"), 0.0, m_new)  # no key yet: -inf less -inf is NaN
    p = tl.math.exp2(s - base[:, None])
    alpha = tl.math.exp2(m_i - base)
    l_i = l_i * alpha[:, None] + p
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, l_i


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


def merge_splits(part: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Merge partial attention over splits of the keys by their LSE.

    Args:
        part: float32 `[B, Hq, Sq, splits, Dv]`, contiguous; not read where the LSE is `-inf`.
        part_lse: float32 `[B, Hq, Sq, splits]`, contiguous.
        out: `[B, Hq, Sq, Dv]`, which is written; its last stride is 1.
        lse: float32 `[B, Hq, Sq]`, contiguous, which is written.
    """
    batch, heads, q_length, splits, value_dim = part.shape
    block_s = max(16, triton.next_power_of_2(splits))  # few variants while a growing cache is short
    block_dv = min(triton.next_power_of_2(value_dim), max(16, 2048 // block_s))
    _merge_kernel[(batch * heads * q_length, triton.cdiv(value_dim, block_dv))](
        part,
        part_lse,
        out,
        lse,
        *out.stride()[:3],
        heads,
        q_length,
        splits,
        DV=value_dim,
        BLOCK_S=block_s,
        BLOCK_DV=block_dv,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["q_length", "splits"])
def _merge_kernel(
    part,
    part_lse,
    o,
    lse,
    stride_ob,
    stride_oh,
    stride_os,
    heads,
    q_length,
    splits,
    DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Output and LSE of one query from those of its splits; a program holds some columns of the output."""
    row = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    offs_s = tl.arange(0, BLOCK_S)
    offs_dv = i_d * BLOCK_DV + tl.arange(0, BLOCK_DV)
    lses = tl.load(part_lse + row * splits + offs_s, mask=offs_s < splits, other=-float("inf"))
    mask = (lses > -float("inf"))[:, None] & (offs_dv < DV)[None, :]
    parts = tl.load(part + (row * splits + offs_s)[:, None] * DV + offs_dv[None, :], mask=mask, other=0.0)
    highest = tl.max(lses, 0)
    weights = tl.exp(lses - tl.where(highest == -float("inf"), 0.0, highest))
    total = tl.sum(weights, 0)
    divisor = tl.where(total > 0, total, 1.0)
    merged = tl.sum(parts * weights[:, None], 0) / divisor
    i_b, i_h, i_q = row // q_length // heads, row // q_length % heads, row % q_length
    p_o = o + i_b * stride_ob + i_h * stride_oh + i_q * stride_os
    tl.store(p_o + offs_dv, merged.to(o.dtype.element_ty), mask=offs_dv < DV)
    if i_d == 0:
        tl.store(lse + row, highest + tl.log(divisor))


@triton.jit
def window_at(p_window, position):
    """Windows of queries at positions; `p_window` points to the most, base, slope and least of a `GrowingWindow`."""
    grown = (tl.load(p_window + 1) + tl.load(p_window + 2) * (position.to(tl.int64) + 1)) >> 16
    return tl.minimum(tl.maximum(grown, tl.load(p_window + 3)), tl.load(p_window)).to(tl.int32)
