"""The statistics of a layer's pages in its `KVState`: when they are made, grown and refreshed."""

import sys

import torch

from sparse_patch.call import AttentionCall, KVState, TensorSlot
from sparse_patch.kernels.availability import prefers_triton
from sparse_patch.kernels.room import SPARE
from sparse_patch.ops.selection.page_statistics.pages import num_pages

PAGES = TensorSlot("page statistics")


def up_to_date(call: AttentionCall, names: tuple[str, ...], page_size: int, offset: int) -> list[torch.Tensor]:
    """The tensors `names` with the pages of the call's keys, `[B, Hkv, Np, D]` each: bounds if two, means if one."""
    pages = num_pages(call.kv_length, page_size, offset)
    kv_state = call.kv_state
    if kv_state is None:
        tensors, whole = _new(call, len(names), pages), True
    else:
        whole = _is_behind(call, kv_state, names)
        tensors = _with_room(call, kv_state, names, whole, page_size, offset)
        if call.length is not None:
            kv_state.covered = call.length
    if pages:
        _refresh(call, tensors, call.kv_length if whole else call.q.shape[2], page_size, offset)
    return [tensor[:, :, :pages] for tensor in tensors]


def _is_behind(call: AttentionCall, kv_state: KVState, names: tuple[str, ...]) -> bool:
    """Whether the state lacks tokens from before the call. Only the device may know, and then it is assumed not to."""
    kept = kv_state.of(PAGES)
    if any(name not in kept for name in names) or kept[names[0]].shape[0] != call.k.shape[0]:
        return True
    return call.length is not None and kv_state.covered < call.length - call.q.shape[2]


def _with_room(
    call: AttentionCall, kv_state: KVState, names: tuple[str, ...], whole: bool, page_size: int, offset: int
) -> list[torch.Tensor]:
    """The tensors in `kv_state`, with room for the call's pages; replaced if they are too small or missing."""
    pages = kv_state.of(PAGES)
    kept = [pages[name] for name in names if name in pages]
    fits = len(kept) == len(names) and kept[0].shape[0] == call.k.shape[0]
    if fits and kept[0].shape[2] >= num_pages(call.kv_length, page_size, offset):
        return kept
    tensors = _new(call, len(names), num_pages(_room(call), page_size, offset))
    if not whole:
        for new, old in zip(tensors, kept, strict=True):
            new[:, :, : old.shape[2]] = old
    pages.clear()  # statistics of another kind would not be refreshed from here on
    pages.update(zip(names, tensors, strict=True))
    return tensors


def _room(call: AttentionCall) -> int:
    """Tokens to have room for: as many as the keys' own buffer, of which a call may show only the filled part."""
    buffer = call.k.stride(1) // max(call.k.stride(2), 1)  # `[B, Hkv, room, D]` in memory
    if call.kv_end is not None or buffer > call.kv_length:
        return max(buffer, call.kv_length)
    return call.kv_length + SPARE + call.kv_length // 8


def _new(call: AttentionCall, number: int, pages: int) -> list[torch.Tensor]:
    batch, heads, _, head_dim = call.k.shape
    tensors = [call.k.new_empty(batch, heads, pages, head_dim) for _ in range(number)]
    # A static cache marks its own tensors and so imports this. The import takes seconds; other caches do not need it.
    if not torch.compiler.is_compiling() and "torch._dynamo" in sys.modules:
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)
    return tensors


def _refresh(call: AttentionCall, tensors: list[torch.Tensor], tokens: int, page_size: int, offset: int) -> None:
    """Compute the pages that hold one of each row's last `tokens` tokens."""
    if prefers_triton(call.k):
        from sparse_patch.ops.selection.page_statistics.triton import refresh
    else:
        from sparse_patch.ops.selection.page_statistics.torch import refresh
    refresh(call, tensors, tokens, page_size, offset)
