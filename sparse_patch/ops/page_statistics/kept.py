"""The statistics of a layer's pages in its memory: when they are made, grown and refreshed."""

import sys

import torch

from sparse_patch.call import AttentionCall
from sparse_patch.memory import LayerMemory
from sparse_patch.ops.backends import takes_triton

_SPARE = 256  # tokens of room beyond what is asked for, where the keys' own buffer has none


def up_to_date(call: AttentionCall, names: tuple[str, ...], page_size: int, offset: int) -> list[torch.Tensor]:
    """The tensors `names` with the pages of the call's keys, `[B, Hkv, Np, D]` each: bounds if two, means if one."""
    pages = num_pages(call.kv_length, page_size, offset)
    memory = call.memory
    if memory is None:
        tensors, whole = _new(call, len(names), pages), True
    else:
        whole = _is_behind(call, memory, names)
        tensors = _with_room(call, memory, names, whole, page_size, offset)
        if call.kv_end is None:
            memory.covered = call.kv_length
    if pages:
        _refresh(call, tensors, call.kv_length if whole else call.q.shape[2], page_size, offset)
    return [tensor[:, :, :pages] for tensor in tensors]


def num_pages(tokens: int, page_size: int, offset: int) -> int:
    """Pages of a row of so many tokens."""
    return max(0, -(-(tokens - offset) // page_size))


def pages_of(tokens: int, page_size: int) -> int:
    """Most pages that so many tokens in a row can lie in."""
    return (tokens + page_size - 2) // page_size + 1


def _is_behind(call: AttentionCall, memory: LayerMemory, names: tuple[str, ...]) -> bool:
    """Whether the memory lacks tokens from before the call. Of a static cache's decode step only the device knows."""
    if any(name not in memory.tensors for name in names) or memory.tensors[names[0]].shape[0] != call.k.shape[0]:
        return True
    return call.kv_end is None and memory.covered < call.q_start


def _with_room(
    call: AttentionCall, memory: LayerMemory, names: tuple[str, ...], whole: bool, page_size: int, offset: int
) -> list[torch.Tensor]:
    """The tensors in memory, with room for the call's pages: replaced where they are too small or not there."""
    kept = [memory.tensors[name] for name in names if name in memory.tensors]
    fits = len(kept) == len(names) and kept[0].shape[0] == call.k.shape[0]
    if fits and kept[0].shape[2] >= num_pages(call.kv_length, page_size, offset):
        return kept
    tensors = _new(call, len(names), num_pages(_room(call), page_size, offset))
    if not whole:
        for new, old in zip(tensors, kept, strict=True):
            new[:, :, : old.shape[2]] = old
    for name in [name for name in memory.tensors if name.startswith("page_")]:
        del memory.tensors[name]  # statistics of another kind would not be refreshed from here on
    memory.tensors.update(zip(names, tensors, strict=True))
    return tensors


def _room(call: AttentionCall) -> int:
    """Tokens to have room for: as many as the keys' own buffer, of which a call may show the filled part only."""
    buffer = call.k.stride(1) // max(call.k.stride(2), 1)  # `[B, Hkv, room, D]` in memory
    if call.kv_end is not None or buffer > call.kv_length:
        return max(buffer, call.kv_length)
    return call.kv_length + _SPARE + call.kv_length // 8


def _new(call: AttentionCall, number: int, pages: int) -> list[torch.Tensor]:
    batch, heads, _, head_dim = call.k.shape
    tensors = [call.k.new_empty(batch, heads, pages, head_dim) for _ in range(number)]
    # A static cache's own tensors are marked too, which imports this; it takes seconds and others do not need it.
    if not torch.compiler.is_compiling() and "torch._dynamo" in sys.modules:
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)
    return tensors


def _refresh(call: AttentionCall, tensors: list[torch.Tensor], tokens: int, page_size: int, offset: int) -> None:
    """Compute the pages that hold one of each row's last `tokens` tokens."""
    if takes_triton(call.k):
        from sparse_patch.ops.page_statistics.triton import refresh
    else:
        from sparse_patch.ops.page_statistics.torch import refresh
    refresh(call, tensors, tokens, page_size, offset)
