"""Reference backend: whole score matrices of one head of one row at a time, step by step as the package's text says."""

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.ops.selection.low_bit_scores.maps import packed
from sparse_patch.ops.selection.low_bit_scores.params import DENSE_BELOW, KEY_BLOCK, QUERY_TILE, SEGMENT, LowBitParams
from sparse_patch.plans import BlockGrid


def decisions(call: AttentionCall, tau: torch.Tensor, rule: LowBitParams) -> torch.Tensor:
    """See `ops.selection.low_bit_scores`."""
    grid = BlockGrid.of(call, QUERY_TILE)
    num_words = -(-call.kv_length // (32 * KEY_BLOCK))
    batch, heads = call.q.shape[:2]
    bits = torch.zeros(batch, heads, grid.num_query_blocks, num_words * 32, dtype=torch.bool, device=call.q.device)
    for row, start in enumerate(grid.row_starts.tolist()):
        first = max(call.q_start - start, 0)
        for head in range(heads):
            q = call.q[row, head, max(start - call.q_start, 0) :]
            k = call.k[row, head // call.group_size, start:]
            kept = _head_map(q, k, first, float(tau[head]), call, rule)
            bits[row, head, : kept.shape[0], : kept.shape[1]] = kept
    return packed(bits)


def _head_map(
    q: torch.Tensor, k: torch.Tensor, first: int, tau: float, call: AttentionCall, rule: LowBitParams
) -> torch.Tensor:
    """The decisions of one head: queries `[S, D]` from position `first` on, keys `[n, D]`; bool `[NQ, blocks]`."""
    dtype, length = q.dtype, k.shape[0]
    smoothed_k = k - k.float().mean(0).to(dtype)
    exact = q.float() @ smoothed_k.float().T
    whole = q.float() @ (k - smoothed_k).float().T if call.softcap is not None else torch.zeros(())
    logits = apply_softcap((exact + whole) * call.scale, call.softcap)
    estimated = _estimate(q, k, smoothed_k, first, rule)
    position = torch.arange(first, length)
    blocks = -(-length // KEY_BLOCK)
    tile_ids = range(first // QUERY_TILE, (length - 1) // QUERY_TILE + 1)
    kept = torch.zeros(len(tile_ids), blocks, dtype=torch.bool)
    for row, tile in enumerate(tile_ids):
        visible = min(blocks, 2 * (tile + 1))
        segments = max(0, (visible - 1 - rule.local_window // KEY_BLOCK) // (SEGMENT // KEY_BLOCK))
        local = 1 + segments * (SEGMENT // KEY_BLOCK)
        if tau < DENSE_BELOW:
            local = 1
        kept[row, 0] = True
        kept[row, local:visible] = True
        for i in (position // QUERY_TILE == tile).nonzero().flatten().tolist():
            query = int(position[i])
            region = [n for n in range(query + 1) if n < KEY_BLOCK or n // KEY_BLOCK >= local]
            limit = logits[i, region].logsumexp(0) + torch.tensor(tau).log()
            for block in range(1, local):
                scores = estimated[i, block * KEY_BLOCK : (block + 1) * KEY_BLOCK]
                if call.softcap is not None:
                    there = whole[i, block * KEY_BLOCK : (block + 1) * KEY_BLOCK]
                    over = apply_softcap((scores.float() + there) * call.scale, call.softcap).max() > limit
                else:
                    raw = limit / call.scale
                    over = (scores.max() > raw.to(scores.dtype)) if rule.numerics == "int4" else scores.max() > raw
                kept[row, block] |= bool(over)
    return kept


def _estimate(
    q: torch.Tensor, k: torch.Tensor, smoothed_k: torch.Tensor, first: int, rule: LowBitParams
) -> torch.Tensor:
    """Estimated products of the queries with the smoothed keys `[S, n]`."""
    key = torch.arange(k.shape[0])
    query = torch.arange(first, first + q.shape[0])
    if rule.numerics == "int8":
        codes_k, scale_k = _quantise(smoothed_k, key // KEY_BLOCK, 127, torch.float32)
        codes_q, scale_q = _quantise(q, query, 127, torch.float32)
        return (codes_q @ codes_k.T) * scale_k * scale_q[:, None]
    dtype = q.dtype
    mean_q = q.float().mean(0).to(dtype)
    codes_k, scale_k = _quantise(smoothed_k, key // KEY_BLOCK * 4 + key % 8 // 2, 7, dtype)
    codes_q, scale_q = _quantise(q - mean_q, query // 16 * 8 + query % 8, 7, dtype)
    term = (smoothed_k.float() @ mean_q.float() / scale_k.float()).to(dtype)
    whole = codes_q @ codes_k.T + (term.float() / scale_q.float()[:, None]).round()
    return whole.to(dtype) * (scale_q[:, None] * scale_k)


def _quantise(
    x: torch.Tensor, group: torch.Tensor, largest_code: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as float32 `[n, D]`, and the scale `[n]` of each row of `x`; row n has the group `group[n]`."""
    scale = torch.zeros(x.shape[0], dtype=dtype, device=x.device)
    for number in group.unique().tolist():
        members = group == number
        scale[members] = (x[members].float().abs().max() / largest_code).to(dtype)
    scale[scale == 0] = 1
    return (x.float() / scale.float()[:, None]).round().clamp(-largest_code, largest_code), scale
