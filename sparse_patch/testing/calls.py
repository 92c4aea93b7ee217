"""Random attention calls with structure: their attention is peaked, local and sink-heavy instead of uniform."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from sparse_patch.call import AttentionCall


def make_call(
    length: int,
    *,
    queries: int | None = None,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    value_dim: int | None = None,
    row_starts: list[int] | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 1.5,
    seed: int = 0,
) -> AttentionCall:
    """A prefill call of the last `queries` (by default all) of `length` positions. Padding contains large garbage."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    batch = len(row_starts) if row_starts else 1
    drift = torch.linspace(0, length / 40, length)[:, None] * rand(1, head_dim)  # near keys look alike
    base = torch.sin(drift)
    k = rand(batch, heads[1], length, head_dim) + 2 * base
    q = 4 * head_dim**-0.5 * sharpness * (rand(batch, heads[0], length, head_dim) + 2 * base)
    v = rand(batch, heads[1], length, value_dim or head_dim)
    for row, start in enumerate(row_starts or []):
        k[row, :, :start] = 50.0
        v[row, :, :start] = 1000.0
        q[row, :, :start] = -50.0
    q = q[:, :, length - (queries or length) :]
    starts = torch.tensor(row_starts) if row_starts else None
    return AttentionCall(
        q=q.to(dtype).transpose(1, 2).contiguous().transpose(1, 2),  # strides as Transformers hands them over
        k=k.to(dtype),
        v=v.to(dtype),
        scale=0.9 * head_dim**-0.5,
        layer=0,
        phase="prefill",
        q_start=length - (queries or length),
        kv_start=starts,
        softcap=softcap,
    )


def decode_call(length: int, *, tail: int | None = None, queries: int = 1, **options: Any) -> AttentionCall:
    """A decode call whose padding is NaN. With a `tail`, its static buffer has `tail` more keys, all NaN."""
    call = make_call(length, queries=queries, **options)
    k, v = call.k.clone(), call.v.clone()
    for row, start in enumerate(options.get("row_starts") or []):
        k[row, :, :start], v[row, :, :start] = torch.nan, torch.nan
    call = replace(call, k=k, v=v, phase="decode")
    if tail is None:
        return call
    k, v = (F.pad(x, (0, 0, 0, tail), value=torch.nan) for x in (k, v))
    return replace(call, k=k, v=v, q_start=0, kv_end=torch.tensor(length))


def row_alone(call: AttentionCall, row: int) -> tuple[AttentionCall, slice]:
    """One row of a padded call as a separate call, and the row's real queries in the batch."""
    assert call.kv_start is not None
    start = int(call.kv_start[row])
    first_query = max(start - call.q_start, 0)
    alone = AttentionCall(
        q=call.q[row : row + 1, :, first_query:],
        k=call.k[row : row + 1, :, start:],
        v=call.v[row : row + 1, :, start:],
        scale=call.scale,
        layer=call.layer,
        phase=call.phase,
        q_start=max(call.q_start - start, 0),
        softcap=call.softcap,
    )
    return alone, slice(first_query, None)


def in_buffer(call: AttentionCall, room: int) -> AttentionCall:
    """The same call from a static cache: buffers with a poisoned tail, whose length only the device knows."""
    batch, heads, length, head_dim = call.k.shape
    k = torch.full((batch, heads, length + room, head_dim), torch.nan, dtype=call.k.dtype)
    v = torch.full((batch, heads, length + room, call.v.shape[-1]), torch.nan, dtype=call.v.dtype)
    k[:, :, :length], v[:, :, :length] = call.k, call.v
    return replace(call, k=k, v=v, q_start=-1, kv_end=torch.tensor(length))
