"""The launches that choose blocks: the scores of a few thousand tokens at a time, then the best blocks of each token.

The scores of all tokens would take many times the memory of the keys, so slices of the queries go through both steps
one after the other.
"""

import torch
import triton

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.launch import by_row, gpu_properties, launch_op, tma_ready
from sparse_patch.ops.backends import why_no_kernel
from sparse_patch.ops.selection.compressed_keys.params import BLOCK, COLUMNS, CompressedKeysParams
from sparse_patch.ops.selection.compressed_keys.triton.lists import write_lists
from sparse_patch.ops.selection.compressed_keys.triton.part import Part
from sparse_patch.ops.selection.compressed_keys.triton.scores import Tile, tile_of, write_scores
from sparse_patch.plans import BlockGrid

_SCORES_BYTES = 128 << 20  # most for a slice of the queries; smaller slices leave a large GPU idle at their ends
_WIDEST = 1 << 17  # blocks of all tokens of a tile that a program can hold


def why_unsupported(call: AttentionCall, tile: int) -> str | None:
    """Why the kernels cannot choose on a device that runs them; None if they can."""
    if call.group_size > 128:
        return f"backend triton: {call.group_size} query heads of a KV head"
    if tile * triton.next_power_of_2(-(-call.kv_length // BLOCK)) > _WIDEST:
        return f"backend triton: {call.kv_length} keys"
    return why_no_kernel(call)


def choose(
    call: AttentionCall, k1: torch.Tensor, k2: torch.Tensor, rule: CompressedKeysParams, grid: BlockGrid, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.selection.compressed_keys.torch.choose`."""
    return choose_token_blocks(
        call.q,
        k1,
        k2,
        call.kv_start,
        call.scale,
        call.softcap or 0.0,
        call.q_start,
        call.kv_length,
        rule.init_blocks,
        rule.local_blocks,
        rule.dense_blocks,
        rule.chosen,
        tile,
        grid.num_query_blocks,
    )


def _outputs(
    q: torch.Tensor, k1: torch.Tensor, kv_length: int, chosen: int, tile: int, query_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    lists = len(q), k1.shape[1], query_blocks * (BLOCK // tile)
    entries = q.new_empty(*lists, min(tile * chosen, -(-kv_length // BLOCK)), dtype=torch.int32)
    return entries, q.new_empty(lists, dtype=torch.int32)


@launch_op("choose_token_blocks", _outputs)
def choose_token_blocks(
    q: torch.Tensor,
    k1: torch.Tensor,
    k2: torch.Tensor,
    kv_start: torch.Tensor | None,
    scale: float,
    softcap: float,
    q_start: int,
    kv_length: int,
    init_blocks: int,
    local_blocks: int,
    dense_blocks: int,
    chosen: int,
    tile: int,
    query_blocks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels' launches, slice by slice; as in `AttentionCall` and `CompressedKeysParams`, softcap 0 for none.

    Returns:
        Entries and counts of a `TokenBlockPlan`.
    """
    batch, heads, q_length, head_dim = q.shape
    kv_heads = k1.shape[1]
    lists, key_blocks = batch * kv_heads, triton.cdiv(kv_length, BLOCK)
    entries, counts = _outputs(q, k1, kv_length, chosen, tile, query_blocks)
    k1, k2 = tma_ready(k1), tma_ready(k2)
    cut = tile_of(triton.next_power_of_2(heads // kv_heads), head_dim, q.dtype)
    width = triton.cdiv(key_blocks, cut.columns // COLUMNS) * (cut.columns // COLUMNS)
    most = min(_blocks_at_once(lists, width, cut, gpu_properties(q.device)[0]), query_blocks)
    scores = q.new_empty(2, lists * most * BLOCK * width, dtype=torch.float32)
    chosen_map = torch.empty_like(scores[0], dtype=torch.int8)
    for first in range(0, query_blocks, most):
        part = Part(
            first,
            min(most, query_blocks - first),
            starts=by_row(kv_start, counts),
            has_start=kv_start is not None,
            q_start=q_start,
            q_length=q_length,
            heads=kv_heads,
            lists=lists,
            width=width,
            always=(init_blocks, local_blocks, dense_blocks),
        )
        seen = min(q_start // BLOCK + first + part.size, key_blocks)  # of the longest row
        write_scores(scores, q, k1, k2, scale, softcap, part, cut)
        write_lists(entries, counts, scores, chosen_map, seen, chosen, tile, part)
    return entries, counts


def _blocks_at_once(lists: int, width: int, cut: Tile, multiprocessors: int) -> int:
    """Query blocks per slice: as many as fit, but only as many as fill the GPU a whole number of times."""
    fit = max(1, _SCORES_BYTES // (9 * lists * BLOCK * width))  # a score of each kind, and what is chosen
    programs, at_once = lists * BLOCK // cut.tokens, 2 * multiprocessors  # programs per query block, and side by side
    return max(fit * programs // at_once * at_once // programs, 1) if fit * programs > at_once else fit
