"""PyTorch backend: exact integer products in float32, one slice of query tiles and one word of key blocks at a time."""

import math
from dataclasses import dataclass

import torch

from sparse_patch.call import AttentionCall, apply_softcap
from sparse_patch.kernels.slices import slices
from sparse_patch.ops.layout import query_slots
from sparse_patch.ops.selection.low_bit_scores.maps import packed
from sparse_patch.ops.selection.low_bit_scores.params import (
    DENSE_BELOW,
    KEY_BLOCK,
    QUERY_TILE,
    SEGMENT,
    WORD_KEYS,
    LowBitParams,
    TileBounds,
    mean_key,
    mean_query,
)

_MEAN_LIMIT = 2.0**29  # bound of the mean query's term, so that its sum with a product stays an int32


@dataclass(frozen=True)
class QuantisedKeys:
    """The smoothed keys of a call as codes, each row from its own first key, with zeros after its last.

    Attributes:
        codes: int8 `[B, Hkv, S, D]`; S is a multiple of 1024.
        scales: `[B, Hkv, S / 32, L]`: float32 with L = 1 for int8, in the model's dtype with L = 4 for int4, where key
            `n` of a block has the scale `(n % 8) // 2`.
        mean_term: `[B, Hq, S]` in the model's dtype: the mean query times the smoothed key, in units of the key's
            scale; None for int8.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    mean_term: torch.Tensor | None


def decisions(call: AttentionCall, tau: torch.Tensor, rule: LowBitParams) -> torch.Tensor:
    """See `ops.selection.low_bit_scores`."""
    bounds = TileBounds.of(call, rule)
    mean_k = mean_key(call)
    mean_q = mean_query(call) if rule.numerics == "int4" else None
    keys = quantised_keys(call, rule, mean_k, mean_q)
    batch, heads, _, head_dim = call.q.shape
    words = torch.zeros(
        batch, heads, bounds.grid.num_query_blocks, bounds.num_words, dtype=torch.int32, device=call.q.device
    )
    bytes_each = batch * heads * QUERY_TILE * 4 * (3 * WORD_KEYS + 4 * head_dim)
    for part in slices(bounds.grid.num_query_blocks, bytes_each):
        _decide(call, tau, bounds, keys, mean_k, mean_q, part, words)
    return words


def quantised_keys(
    call: AttentionCall, rule: LowBitParams, mean_k: torch.Tensor, mean_q: torch.Tensor | None
) -> QuantisedKeys:
    """Codes and scales of the keys.

    Args:
        call: the attention call.
        rule: the rule.
        mean_k: `[B, Hkv, D]`, is subtracted from the keys.
        mean_q: `[B, Hq, D]`, is subtracted from the queries; None for int8.
    """
    bounds = TileBounds.of(call, rule)
    slot = torch.arange(bounds.num_words * WORD_KEYS, device=call.k.device).expand(call.k.shape[0], -1)
    smoothed = smoothed_keys(call, bounds, mean_k, slot, slot < bounds.grid.lengths[:, None])
    groups = smoothed.float().unflatten(2, (-1, KEY_BLOCK // 8, 4, 2))  # keys with the same (n % 8) // 2: dims 3 and 5
    if mean_q is None:
        largest = groups.abs().amax((3, 4, 5, 6), keepdim=True)
    else:
        largest = groups.abs().amax((3, 5, 6), keepdim=True)
    scales = scale_of(largest, rule, call.k.dtype)
    codes = to_codes(groups, scales, rule).flatten(2, 5)
    mean_term = None
    if mean_q is not None:
        query = mean_q.float().unflatten(1, (-1, call.group_size))
        products = (query @ smoothed.float().mT).unflatten(-1, groups.shape[2:6])  # [B, Hkv, G, blocks, 4, 4, 2]
        in_units = products / scales.float().squeeze(-1)[:, :, None]
        mean_term = in_units.to(call.k.dtype).flatten(3).flatten(1, 2)
    return QuantisedKeys(codes, scales.flatten(3), mean_term)


def quantised_queries(
    q: torch.Tensor, real: torch.Tensor, rule: LowBitParams, mean_q: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, int8, and scales of whole query tiles.

    Args:
        q: `[B, Hq, R, D]`, zeros in slots without a query.
        real: which slots hold a query, bool `[B, R]`.
        rule: the rule.
        mean_q: `[B, Hq, D]`; None for int8.

    Returns:
        Codes, int8 `[B, Hq, R, D]`, and the scale of each query, `[B, Hq, R]`: float32, or the model's dtype for int4.
    """
    if mean_q is not None:
        q = (q - mean_q[:, :, None]).masked_fill(~real[:, None, :, None], 0)
    q = q.float()
    largest = q.abs().amax(-1, keepdim=True)
    if mean_q is not None:  # queries r and r + 8 of 16 together
        pairs = largest.unflatten(2, (-1, 2, 8))
        largest = pairs.amax(3, keepdim=True).expand_as(pairs).flatten(2, 4)
    scales = scale_of(largest, rule, mean_q.dtype if mean_q is not None else torch.float32)
    return to_codes(q, scales, rule), scales.squeeze(-1)


def scale_of(largest: torch.Tensor, rule: LowBitParams, dtype: torch.dtype) -> torch.Tensor:
    """The scale of a group as it is stored, from its largest magnitude, float32; 1 for a group of zeros."""
    scale = (largest / rule.largest_code).to(dtype if rule.numerics == "int4" else torch.float32)
    return scale.masked_fill(scale == 0, 1)


def to_codes(x: torch.Tensor, scales: torch.Tensor, rule: LowBitParams) -> torch.Tensor:
    """Codes, int8, of float32 values."""
    return (x / scales.float()).round_().clamp_(-rule.largest_code, rule.largest_code).to(torch.int8)


def smoothed_keys(
    call: AttentionCall, bounds: TileBounds, mean_k: torch.Tensor, slot: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Keys by their position within the row, minus the mean, in the model's dtype; zeros if not valid.

    Args:
        call: the attention call.
        bounds: its tiles.
        mean_k: `[B, Hkv, D]`.
        slot: positions, int64 `[B, T]`; may lie outside the row if not valid.
        valid: bool `[B, T]`.

    Returns:
        `[B, Hkv, T, D]`.
    """
    rows = torch.arange(slot.shape[0], device=slot.device)[:, None]
    position = (slot + bounds.grid.row_starts[:, None]).clamp(0, call.kv_length - 1)
    keys = call.k.transpose(1, 2)[rows, position].transpose(1, 2) - mean_k[:, :, None]
    return keys.masked_fill(~valid[:, None, :, None], 0)


def limits(
    call: AttentionCall,
    tau: torch.Tensor,
    bounds: TileBounds,
    mean_k: torch.Tensor,
    q: torch.Tensor,
    real: torch.Tensor,
    part: slice,
) -> torch.Tensor:
    """The limit that an estimated product of query and smoothed key must exceed to keep its block.

    Args:
        call: the attention call.
        tau: float32 `[Hq]`.
        bounds: its tiles.
        mean_k: `[B, Hkv, D]`.
        q: the queries of the tiles of `part`, `[B, Hq, R, D]`.
        real: which of them are real, bool `[B, R]`.
        part: which query tiles.

    Returns:
        Float32 `[B, Hq, R]`, in units of a product of query and key; infinite for queries that do not exist.
    """
    visible, local = bounds.visible[:, part, None], bounds.local[:, part, None]  # [B, T, 1]
    reach = bounds.rule.local_window + SEGMENT
    sink = torch.arange(KEY_BLOCK, device=q.device).expand(*visible.shape[:2], -1)
    near = visible * KEY_BLOCK - reach + torch.arange(reach, device=q.device)
    slot = torch.cat((sink, near), -1)  # [B, T, K]
    valid = torch.cat((torch.ones_like(sink, dtype=torch.bool), near >= local * KEY_BLOCK), -1)
    valid &= slot < bounds.grid.lengths[:, None, None]
    keys = smoothed_keys(call, bounds, mean_k, slot.flatten(1), valid.flatten(1)).float()
    keys = keys.unflatten(2, slot.shape[1:])  # [B, Hkv, T, K, D]
    # [B, Hkv, T, G, 64, D]: the heads of a KV head together
    grouped = q.float().unflatten(2, (-1, QUERY_TILE)).unflatten(1, (-1, call.group_size)).transpose(2, 3)
    products = (grouped.flatten(3, 4) @ keys.mT).unflatten(3, (call.group_size, -1))
    products = products.transpose(2, 3).flatten(1, 2)  # [B, Hq, T, 64, K]
    taken_off = None
    if call.softcap is not None:
        mean = mean_k.float().repeat_interleave(call.group_size, 1)
        taken_off = (q.float() @ mean[..., None]).squeeze(-1)  # [B, Hq, R]
        products = products + taken_off.unflatten(2, (-1, QUERY_TILE))[..., None]
    logits = apply_softcap(products * call.scale, call.softcap)
    row = bounds.grid.query_block_ids[:, part, None] * QUERY_TILE + torch.arange(QUERY_TILE, device=q.device)
    seen = valid[:, :, None] & (slot[:, :, None] <= row[..., None])
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    limit = logits.logsumexp(-1).flatten(2) + tau.log()[:, None]
    if taken_off is not None and call.softcap is not None:
        limit = uncapped(limit, call.softcap) / call.scale - taken_off
    else:
        limit = limit / call.scale
    return limit.masked_fill(~real[:, None], torch.inf)


def uncapped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """The logits that a softcap turns into these; infinite beyond the cap."""
    return softcap * (logits / softcap).clamp(-1, 1).atanh()


def _decide(
    call: AttentionCall,
    tau: torch.Tensor,
    bounds: TileBounds,
    keys: QuantisedKeys,
    mean_k: torch.Tensor,
    mean_q: torch.Tensor | None,
    part: slice,
    words: torch.Tensor,
) -> None:
    """Write the words of a slice of the query tiles."""
    grid, rule = bounds.grid, bounds.rule
    begin, end = part.start * QUERY_TILE, part.stop * QUERY_TILE
    q, real = query_slots(call.q, grid, begin, end), grid.query_is_real.flatten(1)[:, begin:end]
    limit = limits(call, tau, bounds, mean_k, q, real, part)
    codes, scales = quantised_queries(q, real, rule, mean_q)
    visible, local = bounds.visible[:, None, part, None], bounds.local[:, None, part, None]
    dense = (tau < DENSE_BELOW)[:, None, None]
    for word in range(math.ceil(grid.visible_key_blocks(part.stop) * QUERY_TILE / WORD_KEYS)):
        over = _exceeding(call, keys, codes, scales, limit, word)
        block = word * 32 + torch.arange(32, device=words.device)
        kept = (over.unflatten(2, (-1, QUERY_TILE)).any(3) & (block < local)) | dense | (block == 0) | (block >= local)
        words[:, :, part, word] = packed(kept & (block < visible)).squeeze(-1)


def _exceeding(
    call: AttentionCall,
    keys: QuantisedKeys,
    codes: torch.Tensor,
    scales: torch.Tensor,
    limit: torch.Tensor,
    word: int,
) -> torch.Tensor:
    """Which key blocks of a word have an estimate above the limit of a query, bool `[B, Hq, R, 32]`."""
    here = slice(word * WORD_KEYS, (word + 1) * WORD_KEYS)
    of_group = codes.float().unflatten(1, (-1, call.group_size)).flatten(2, 3)
    products = of_group @ keys.codes[:, :, here].float().mT
    products = products.unflatten(2, (call.group_size, -1)).flatten(1, 2)  # [B, Hq, R, 1024], whole numbers
    key_scales = keys.scales[:, :, word * 32 : (word + 1) * 32].repeat_interleave(call.group_size, 1)[:, :, None]
    if keys.mean_term is None:
        largest = products.unflatten(-1, (32, KEY_BLOCK)).amax(-1)
        return largest * key_scales.squeeze(-1) > (limit / scales)[..., None]
    in_units = keys.mean_term[:, :, None, here].float() / scales.float()[..., None]
    products += in_units.round_().clamp_(-_MEAN_LIMIT, _MEAN_LIMIT)
    largest = products.unflatten(-1, (32, KEY_BLOCK // 8, 4, 2)).amax((-3, -1))  # [B, Hq, R, 32, 4]
    dtype = scales.dtype
    estimate = largest.to(dtype) * (scales[..., None, None] * key_scales)
    return (estimate > limit.to(dtype)[..., None, None]).any(-1)
