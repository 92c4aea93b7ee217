"""Key blocks chosen by compressed keys: the selection of InfLLM-V2 (arXiv 2509.24663).

A compressed key is the mean of the keys of a window. Fine windows have 32 tokens, one every 16; coarse windows have 128
tokens, one every 64. Windows count from the row's first key. Both kinds follow from means of 16 tokens each, the pages
of `ops.selection.page_statistics`, which a cache keeps: a fine key is the mean of 2 pages, a coarse key the mean of 8.

A token sees the compressed keys whose windows end before or at the token, so no later key affects its choice. For query
head `h` and token `i` the fine keys have the weights

    p[h, i, j] = exp(logit of fine key j - LSE over the logits of the coarse keys)

The weights do not sum to 1, because the LSE is an estimate; it takes a quarter of the work of the true one. The query
heads of a KV head choose together, by the sum of their weights. The score of a block of 64 tokens is the largest sum
among the five windows that hold a token of the block. Of equal scores the lower block wins. Logits are those of the
model, scaled and softcapped.

Backends: `torch` and `triton`. Both serve float16, bfloat16 or float32, any number of query heads per KV head without
repeating queries or keys, any scale, softcap, left padding per row, `q_start > 0`, any length and strides. Both hold
the scores of one slice of the queries at a time.
"""

import torch.nn.functional as F
from torch import Tensor

from sparse_patch.call import AttentionCall
from sparse_patch.kernels.availability import prefers_triton
from sparse_patch.ops.selection.compressed_keys.params import BLOCK, COARSE, COARSE_PAGES, STRIDE, CompressedKeysParams
from sparse_patch.ops.selection.page_statistics import mean_scores
from sparse_patch.plans import BlockGrid, TokenBlockPlan

__all__ = ["BLOCK", "STRIDE", "CompressedKeysParams", "block_scores", "choose_blocks", "compressed_keys"]


def compressed_keys(means: Tensor) -> tuple[Tensor, Tensor]:
    """The fine and the coarse compressed keys.

    Args:
        means: mean keys `[B, Hkv, Np, D]` of 16 tokens each, from `page_means`.

    Returns:
        `[B, Hkv, n, D]` each, in the dtype of the means: all windows whose pages exist. Keys of windows with a page
        that is not full have no meaning.
    """
    means = F.pad(means, (0, 0, 0, max(COARSE_PAGES - means.shape[2], 0)))
    fine = (means[:, :, :-1].float() + means[:, :, 1:].float()) / 2
    coarse = means.float().unfold(2, COARSE_PAGES, COARSE).mean(-1)
    return fine.to(means.dtype), coarse.to(means.dtype)


def choose_blocks(call: AttentionCall, means: Tensor, rule: CompressedKeysParams) -> TokenBlockPlan:
    """The plan of a prefill call: what every token always reads, and the blocks with its highest scores.

    Args:
        call: the attention call.
        means: mean keys of 16 tokens each, from `page_means`.
        rule: how many blocks.
    """
    grid, tile = BlockGrid.of(call, BLOCK), tile_of(call.group_size)
    keys = compressed_keys(means)
    if prefers_triton(call.q):
        from sparse_patch.ops.selection.compressed_keys.triton import choose as by_kernel
        from sparse_patch.ops.selection.compressed_keys.triton import why_unsupported

        if why_unsupported(call, tile) is None:
            return _plan(call, rule, grid, tile, by_kernel(call, *keys, rule, grid, tile))
    from sparse_patch.ops.selection.compressed_keys.torch import choose as in_torch

    return _plan(call, rule, grid, tile, in_torch(call, *keys, rule, grid, tile))


def tile_of(group_size: int) -> int:
    """Tokens per tile of the plan: as few as make 64 rows with the heads of a group, at most 8 and at least 4.

    Hopper's tensor cores multiply 64 rows at once. With more tokens a block is read less often; with fewer tokens, the
    blocks that they chose are more alike.
    """
    return 4 if group_size > 8 else 8


def block_scores(call: AttentionCall, means: Tensor, rule: CompressedKeysParams) -> Tensor:
    """Scores of blocks for the last query of a call, float32 `[B, Hkv, ceil(kv_length / 64)]`.

    Blocks that the query always reads have +inf, the others a finite score of at least 0. Scores of blocks that a row
    does not have are undefined. The logit of a compressed key is computed as the mean of its pages' logits, which is
    the same.

    Args:
        call: the attention call.
        means: mean keys of 16 tokens each, from `page_means`.
        rule: how many blocks; `dense_blocks` is not used.
    """
    lengths = call.lengths()
    of_pages = mean_scores(call.q[:, :, -1], means, lengths, STRIDE)
    if prefers_triton(call.q) and call.scale > 0:
        from sparse_patch.ops.selection.compressed_keys.triton import block_scores as scores
    else:
        from sparse_patch.ops.selection.compressed_keys.torch import block_scores as scores
    return scores(of_pages, lengths, call.k.shape[1], call.scale, call.softcap, rule)


def _plan(
    call: AttentionCall, rule: CompressedKeysParams, grid: BlockGrid, tile: int, lists: tuple[Tensor, Tensor]
) -> TokenBlockPlan:
    return TokenBlockPlan(
        *lists,
        grid=grid,
        tile=tile,
        heads=call.q.shape[1],
        init_blocks=rule.init_blocks,
        local_blocks=rule.local_blocks,
        dense_blocks=rule.dense_blocks,
    )
