"""Helpers that the launches of several Triton kernels share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch

from sparse_patch.kernels.alignment import STEP, is_aligned

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


class LaunchOp(Protocol[P, R_co]):
    """A launch after `launch_op`.

    Attributes:
        op: the custom op.
    """

    op: Any

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def no_outputs() -> None:
    """The outputs of a launch that only writes to its arguments."""


def launch_op(
    name: str, outputs: Callable[..., Any] = no_outputs, mutates_args: Sequence[str] = ()
) -> Callable[[Callable[P, R_co]], LaunchOp[P, R_co]]:
    """Register a kernel's launch as the custom op `sparse_patch::name`, for torch.compile and for fake tensors.

    Eager calls bypass the op, because its wrapper takes as long on the host as the launch. The first argument is a
    tensor.

    Args:
        name: name of the op.
        outputs: makes empty tensors with the shapes, dtypes and strides of what the launch returns. Its parameters are
            the arguments of the launch that it needs, under the same names; its keyword-only parameters keep their
            defaults.
        mutates_args: names of the tensors that the launch writes to.

    Raises:
        TypeError: `outputs` needs an argument that the launch does not have.
    """

    def decorate(launch: Callable[P, R_co]) -> LaunchOp[P, R_co]:
        op = torch.library.custom_op(f"sparse_patch::{name}", launch, mutates_args=mutates_args)
        op.register_fake(_fake(launch, outputs))

        @wraps(launch)
        def call(x: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
                return op(x, *args, **kwargs)
            return cast(Any, launch)(x, *args, **kwargs)

        made = cast(Any, call)
        made.op = op
        return cast(LaunchOp[P, R_co], made)

    return decorate


def _fake(launch: Callable[..., Any], outputs: Callable[..., Any]) -> Callable[..., Any]:
    """The launch as torch.compile traces it: every call returns what `outputs` returns."""
    arguments = signature(launch)
    needed = [x.name for x in signature(outputs).parameters.values() if x.kind is not Parameter.KEYWORD_ONLY]
    unknown = [name for name in needed if name not in arguments.parameters]
    if unknown:
        raise TypeError(f"the outputs of {launch.__name__} need {', '.join(unknown)}, which it is not given")

    def fake(*args: Any, **kwargs: Any) -> Any:
        given = arguments.bind(*args, **kwargs)
        given.apply_defaults()
        return outputs(*(given.arguments[name] for name in needed))

    return fake


@dataclass(frozen=True)
class Tile:
    """The tiling of a kernel: queries and keys per tile, warps per program, pipeline depth."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tile_of(head_dim: int, dtype: torch.dtype, block_size: int, capability: tuple[int, int]) -> Tile:
    """The tile for a head size, dtype and GPU generation; a static choice, so no prompt length waits for a search."""
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
def gpu_properties(device: torch.device) -> tuple[int, tuple[int, int]]:
    """Number of SMs and compute capability; under the interpreter, those of a small GPU."""
    if device.type != "cuda":
        return 4, (9, 0)
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, (properties.major, properties.minor)


def rows_in_one_piece(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last stride is 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def tma_ready(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if a tensor descriptor can describe it, else a copy with padding after each row."""
    if is_aligned(x):
        return x
    steps = STEP // x.element_size()
    room = x.new_empty(*x.shape[:-1], -(-x.shape[-1] // steps) * steps)
    return room[..., : x.shape[-1]].copy_(x)


def by_row(numbers: torch.Tensor | None, instead: torch.Tensor) -> torch.Tensor:
    """Contiguous numbers, such as those of the rows `[B]`; if there are none, `instead`, which is not read."""
    return instead if numbers is None else numbers.contiguous()


def given(x: torch.Tensor | None, instead: torch.Tensor) -> torch.Tensor:
    """An optional tensor of a kernel; if there is none, `instead`, which is not read."""
    return instead if x is None else x


def block_of(size: int) -> int:
    """The side of a tile that holds `size` numbers: a power of two, and large enough for a product of tiles."""
    return max(16, 1 << (size - 1).bit_length())


def precision_of(dtype: torch.dtype) -> str:
    """The precision with which a kernel multiplies tiles of a dtype."""
    return "ieee" if dtype == torch.float32 else "tf32"


def attention_constants(head_dim: int, value_dim: int, dtype: torch.dtype, has_softcap: bool) -> dict[str, Any]:
    """Compile-time constants of every attention kernel."""
    return {
        "D": head_dim,
        "DV": value_dim,
        "BLOCK_D": block_of(head_dim),
        "BLOCK_DV": block_of(value_dim),
        "HAS_SOFTCAP": has_softcap,
        "PRECISION": precision_of(dtype),
    }


def attention_outputs(
    q: torch.Tensor, v: torch.Tensor, return_lse: bool, *, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty tensors: output `[B, Hq, Sq, Dv]`, in memory `[B, Sq, Hq, Dv]`, and LSE (of size 0 if not asked for)."""
    batch, heads, q_length, _ = q.shape
    out = q.new_empty(batch, q_length, heads, v.shape[-1], dtype=dtype or q.dtype).transpose(1, 2)
    return out, q.new_empty((batch, heads, q_length) if return_lse else (0,), dtype=torch.float32)
