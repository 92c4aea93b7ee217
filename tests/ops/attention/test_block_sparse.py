"""Every backend of the block-sparse op against the oracle, and the oracle against dense attention."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from builders.plans import random_blocks
from calls import make_call

from sparse_patch.call import AttentionCall
from sparse_patch.ops.attention.block_sparse import attend
from sparse_patch.plans import BlockGrid, BlockPlan

FAST = ["torch", "triton"]  # flash needs a GPU
EVERYWHERE = ["reference", *FAST]
# Rounding of float32 logits of about 40 over up to 256 terms, times values of 3; in half precision, of the output.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_matches(call: AttentionCall, plan: BlockPlan, backend: str) -> None:
    expected, expected_lse, _ = attend(call, plan, "reference", return_lse=True)
    output, lse, _ = attend(call, plan, backend, return_lse=True)
    assert output.dtype == call.q.dtype and output.shape == expected.shape
    assert lse is not None and expected_lse is not None
    tolerance = TOLERANCE[call.q.dtype]
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("length", [1, 15, 63, 64, 65, 127, 128, 129, 300])
def test_lengths_around_block_edges(backend: str, block_size: int, length: int) -> None:
    call = make_call(length)
    assert_matches(call, random_blocks(call, block_size, 0.4), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256)])
def test_head_dims_and_dtypes(backend: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly; tests/test_gpu.py has it")
    call = make_call(150, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    assert_matches(call, random_blocks(call, 32, 0.5), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (7, 1), (14, 2), (8, 1)], ids=str)
def test_groups(backend: str, heads: tuple[int, int]) -> None:
    call = make_call(200, heads=heads)
    assert_matches(call, random_blocks(call, 32, 0.4), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("queries", [200, 96, 33, 1])
def test_padding_chunks_and_softcap(backend: str, softcap: float | None, queries: int) -> None:
    call = make_call(200, queries=queries, row_starts=[0, 5, 64, 150], softcap=softcap)
    assert_matches(call, random_blocks(call, 32, 0.4), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("columns", [1, 20, 90])
@pytest.mark.parametrize("queries", [200, 70])
def test_columns_beside_blocks(backend: str, columns: int, queries: int) -> None:
    call = make_call(200, queries=queries, row_starts=[0, 5, 64, 150], heads=(4, 2))
    plan = random_blocks(call, 32, 0.2, columns=columns)
    assert plan.column_counts is not None and (columns == 1 or plan.column_counts.any())
    assert_matches(call, plan, backend)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_all_blocks_equal_dense_attention(backend: str) -> None:
    call = make_call(333, heads=(8, 2), head_dim=64)
    plan = random_blocks(call, 64, 1.1)
    expected = F.scaled_dot_product_attention(call.q, call.k, call.v, is_causal=True, scale=call.scale, enable_gqa=True)
    torch.testing.assert_close(attend(call, plan, backend)[0], expected, atol=2e-5, rtol=1e-5)
    assert plan.density().eq(1).all()


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_queries_without_a_key_give_zero(backend: str) -> None:
    call = make_call(128, row_starts=[0, 40])
    grid = BlockGrid.of(call, 32)
    blocks = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    blocks[:, :, 2, 1] = True  # only the third query block of each row reads anything
    output, lse, _ = attend(call, BlockPlan.from_blocks(blocks, grid), backend, return_lse=True)
    assert lse is not None and not output.isnan().any()
    assert output[0, :, :64].eq(0).all() and output[0, :, 96:].eq(0).all() and output[0, :, 64:96].ne(0).all()
    assert output[1, :, :104].eq(0).all() and output[1, :, 104:].ne(0).all()
    assert lse[0, :, :64].isneginf().all() and lse[0, :, 64:96].isfinite().all()


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_unplanned_keys_and_the_future_are_never_read(backend: str) -> None:
    call = make_call(256)
    blocks = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    blocks[..., 0] = True
    blocks |= torch.eye(4, dtype=torch.bool)
    plan = BlockPlan.from_blocks(blocks, BlockGrid.of(call, 64))
    expected, _, _ = attend(call, plan, backend)
    k, v = call.k.clone(), call.v.clone()
    k[:, :, 64:128], v[:, :, 64:128] = 30.0, 1e6  # block 1: read only by query block 1
    k[:, :, 200:], v[:, :, 200:] = 30.0, 1e6  # the future of queries 192 to 199
    output, _, _ = attend(AttentionCall(**{**vars(call), "k": k, "v": v}), plan, backend)
    unchanged = [*range(64), *range(128, 200)]
    assert torch.equal(output[:, :, unchanged], expected[:, :, unchanged])
    assert (output[:, :, 64:128] != expected[:, :, 64:128]).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("threads", [1, 2])
def test_torch_backend_leaves_threads_and_modes_alone(mode: type, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with mode():
            call = make_call(300)
            plan = random_blocks(call, 32, 0.5)
            assert_matches(call, plan, "torch")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def share_left_out(call: AttentionCall, plan: BlockPlan, backend: str) -> torch.Tensor:
    """Assert that a backend leaves out the oracle's tiles; return their share of each query's weight."""
    assert_matches(call, plan, backend)
    _, lse, _ = attend(call, plan, backend, return_lse=True)
    _, whole, _ = attend(call, replace(plan, pv_threshold=None), backend, return_lse=True)
    assert lse is not None and whole is not None
    return (1 - torch.exp(lse - whole)).nan_to_num(0.0)  # a query without a key loses nothing


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("block_size, length", [(16, 100), (64, 300), (128, 515)])
def test_tiles_far_below_the_running_maximum_are_left_out(backend: str, block_size: int, length: int) -> None:
    call = make_call(length, heads=(2, 1), sharpness=2.0)
    call = AttentionCall(**{**vars(call), "k": call.k * torch.linspace(2, 0, length)[:, None]})  # near keys count least
    for number, threshold in enumerate((0.0, 2.0, 50.0)):
        queries = [length, 77][number % 2]
        part = AttentionCall(**{**vars(call), "q": call.q[:, :, -queries:], "q_start": length - queries})
        plan = replace(random_blocks(part, block_size, 0.7, seed=number), pv_threshold=threshold)
        lost = share_left_out(part, plan, backend)
        assert lost.min() > -1e-4 and lost.max() < length * 2**-threshold + 1e-4
        assert (lost.max() > 1e-3) == (threshold < 50)


@pytest.mark.parametrize("backend", FAST)
def test_tiles_are_left_out_of_padded_rows_and_chunks(backend: str) -> None:
    call = make_call(120, queries=60, heads=(2, 1), row_starts=[0, 5, 43, 90], softcap=20.0)
    call = AttentionCall(**{**vars(call), "k": call.k * torch.linspace(2, 0, 120)[:, None]})
    plan = replace(random_blocks(call, 16, 0.7), pv_threshold=0.5)
    lost = share_left_out(call, plan, backend)
    for row in range(3):
        assert lost[row].max() > 1e-3
    assert lost[3, :, :30].eq(0).all()


def test_a_plan_with_columns_leaves_out_no_tile() -> None:
    plan = random_blocks(make_call(100), 32, 0.5, columns=5)
    with pytest.raises(ValueError, match="pv_threshold"):
        replace(plan, pv_threshold=1.0)
