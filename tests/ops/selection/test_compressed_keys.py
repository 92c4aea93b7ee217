"""Compressed keys as a cache keeps them, the kernels that choose by them, and what both backends do alike."""

from dataclasses import replace

import pytest
import torch
from calls import make_call

from sparse_patch.call import AttentionCall, KVState
from sparse_patch.ops.selection.compressed_keys import CompressedKeysParams, block_scores, compressed_keys
from sparse_patch.ops.selection.compressed_keys.torch import block_scores as scores_in_torch
from sparse_patch.ops.selection.compressed_keys.torch import choose as in_torch
from sparse_patch.ops.selection.compressed_keys.triton import block_scores as scores_by_kernel
from sparse_patch.ops.selection.compressed_keys.triton import choose as by_kernel
from sparse_patch.ops.selection.compressed_keys.triton import why_unsupported
from sparse_patch.ops.selection.page_statistics import mean_scores, page_means
from sparse_patch.plans import BlockGrid, leading

DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_incremental_ones_equal_recomputed_ones_at_every_length(dtype: torch.dtype) -> None:
    whole = make_call(300, row_starts=[0, 21], dtype=dtype)
    kv_state = KVState()
    for length in range(1, 301):
        k, v = whole.k[:, :, :length], whole.v[:, :, :length]
        now = replace(whole, q=whole.q[:, :, :1], k=k, v=v, q_start=length - 1)
        kept = compressed_keys(page_means(replace(now, kv_state=kv_state), 16))
        anew = compressed_keys(page_means(now, 16))
        for row, start in enumerate([0, 21]):
            keys = now.k[row, :, start:].double()
            for found, again, size in zip(kept, anew, (32, 128), strict=True):
                number = max((keys.shape[1] - size // 2) // (size // 2), 0)
                assert torch.equal(found[row, :, :number], again[row, :, :number])
                if number and length % 7 == 0:
                    means = keys.unfold(1, size, size // 2).mean(-1)
                    error = (found[row, :, :number].double() - means).abs().max()
                    assert error < 5 * torch.finfo(dtype).eps, f"{error} at {length}"


def lists_agree(call: AttentionCall, rule: CompressedKeysParams, tile: int) -> None:
    grid, keys = BlockGrid.of(call, 64), compressed_keys(page_means(call, 16))
    (entries, counts), (expected, expected_counts) = (
        choose(call, *keys, rule, grid, tile) for choose in (by_kernel, in_torch)
    )
    assert entries.shape == expected.shape and expected_counts.sum() > 0
    assert torch.equal(counts, expected_counts)
    listed = leading(entries, counts)
    assert torch.equal(entries[listed], expected[listed])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("heads, tile", [((4, 2), 8), ((7, 1), 8), ((16, 1), 4), ((2, 2), 8)], ids=str)
def test_the_kernels_choose_what_torch_does(heads: tuple[int, int], tile: int) -> None:
    call = make_call(520, queries=75, heads=heads, row_starts=[0, 45, 400], softcap=20.0 if tile == 4 else None)
    lists_agree(call, CompressedKeysParams(init_blocks=1, local_blocks=1, dense_blocks=3, chosen=2), tile)


@pytest.mark.parametrize("dtype, head_dim", [(torch.float16, 96), (torch.float32, 256)], ids=str)
def test_dtypes_head_dims_and_slices(dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_patch.ops.selection.compressed_keys.triton.prefill._SCORES_BYTES", 1 << 15)
    monkeypatch.setattr("sparse_patch.kernels.slices.SLICE_BYTES", 1 << 17)
    call = make_call(520, queries=150, heads=(8, 1), head_dim=head_dim, dtype=dtype)
    lists_agree(call, CompressedKeysParams(init_blocks=0, local_blocks=2, dense_blocks=0, chosen=1), 8)


def test_equal_scores_go_to_the_lower_block() -> None:
    """All keys are alike, so every score is the same: products with eighths are exact in any order."""
    call = make_call(640, queries=64, heads=(4, 1))
    call = replace(call, q=(8 * call.q).round() / 8, k=torch.ones_like(call.k))
    rule, grid = CompressedKeysParams(init_blocks=1, local_blocks=1, dense_blocks=0, chosen=3), BlockGrid.of(call, 64)
    keys = compressed_keys(page_means(call, 16))
    for choose in (by_kernel, in_torch):
        entries, counts = choose(call, *keys, rule, grid, 8)
        assert (counts == 3).all()
        assert torch.equal(entries[..., :3], torch.tensor([1, 2, 3]).int().expand(1, 1, 8, 3) << 8 | 255)


def test_scores_of_the_last_query_are_those_of_the_prompt() -> None:
    """The blocks with the highest scores in decode are the choice of prefill."""
    call = make_call(640, queries=1, heads=(8, 2), row_starts=[0, 50], softcap=15.0)
    means = page_means(call, 16)
    rule = CompressedKeysParams(init_blocks=1, local_blocks=1, dense_blocks=0, chosen=2)
    scores = block_scores(call, means, rule)
    assert scores.shape == (2, 2, 10) and (scores >= 0).all()
    grid = BlockGrid.of(call, 64)
    entries, counts = in_torch(call, *compressed_keys(means), rule, grid, 8)
    last = ((call.lengths() - 1) % 64 // 8).tolist()
    for row, own in enumerate([9, 9]):
        assert counts[row, :, last[row]].tolist() == [2, 2]
        best = scores[row, :, 1 : own - 1].sort(dim=-1, descending=True, stable=True).indices[:, :2].sort(-1).values + 1
        assert torch.equal(best.int(), entries[row, :, last[row], :2] >> 8)


@pytest.mark.parametrize("heads, softcap", [((8, 2), None), ((7, 1), 15.0), ((3, 3), None)], ids=str)
def test_scores_of_the_kernel_are_those_of_torch(heads: tuple[int, int], softcap: float | None) -> None:
    for length, number in ((640, 10), (900, 15), (33, 1), (130, 3)):
        call = make_call(length, queries=1, heads=heads, row_starts=[0, 9, 32])
        rule = CompressedKeysParams(init_blocks=1, local_blocks=2, dense_blocks=0, chosen=2)
        of_pages = mean_scores(call.q[:, :, -1], page_means(call, 16), call.lengths(), 16)
        found, expected = (
            scores(of_pages, call.lengths(), heads[1], call.scale, softcap, rule)
            for scores in (scores_by_kernel, scores_in_torch)
        )
        assert found.shape == expected.shape == (3, heads[1], number)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
        for row, start in enumerate([0, 9, 32]):
            own = (length - start - 1) // 64
            always = {0, *range(max(own - 2, 0), own + 1)}
            assert {*found[row, 0].isinf().nonzero().flatten().tolist()} == always


def test_what_the_kernels_cannot_hold() -> None:
    call = make_call(200)
    assert why_unsupported(call, 8) is None
    long = replace(call, k=call.k[:, :, :1].expand(-1, -1, 2_000_000, -1))
    assert "2000000 keys" in str(why_unsupported(long, 8))
    assert why_unsupported(long, 4) is None
