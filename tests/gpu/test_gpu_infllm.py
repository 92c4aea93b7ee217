"""InfLLM-V2 on a GPU: the choice, attention, whole prompts and steps; skipped without a GPU."""

from dataclasses import replace

import pytest
import torch
from bound import bound
from builders.gpu import no_waits, on_gpu
from builders.plans import random_token_blocks
from calls import make_call
from families import llama
from method_table import TOKEN_METHODS

from sparse_patch import growing_cache, patched, sparsity_report
from sparse_patch.call import AttentionCall
from sparse_patch.methods.infllmv2 import InfLLMv2
from sparse_patch.ops.attention.token_blocks import attend, fastest
from sparse_patch.ops.selection.compressed_keys import CompressedKeysParams, choose_blocks, compressed_keys
from sparse_patch.ops.selection.compressed_keys.torch import choose as in_torch
from sparse_patch.ops.selection.compressed_keys.triton import choose as by_kernel
from sparse_patch.ops.selection.page_statistics import page_means
from sparse_patch.plans import BlockGrid, TokenBlockPlan

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# As in tests/ops, with room for sums over more keys in another order.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GROUPS = [(2, 2), (8, 2), (14, 2), (16, 2), (32, 2), (64, 2)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_on_the_gpu(head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    for heads in GROUPS:
        for queries, softcap in ((1300, None), (500, 5.0), (1, None)):
            shape = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim, "dtype": dtype}
            call = on_gpu(make_call(1300, queries=queries, row_starts=[0, 77, 900], softcap=softcap, **shape))
            plan = random_token_blocks(call, tile=4 if heads[0] > 16 else 8, init=2, local=3, dense=4)
            assert fastest(call, plan) == "triton"
            (output, lse, _), (expected, expected_lse, _) = (
                attend(call, plan, name, return_lse=True) for name in ("triton", "reference")
            )
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
            torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=1e-3)


def choices(call: AttentionCall, rule: CompressedKeysParams, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The choices of the kernels and of torch, as maps of blocks."""
    grid, keys = BlockGrid.of(call, 64), compressed_keys(page_means(call, 16))
    rules = rule.init_blocks, rule.local_blocks, rule.dense_blocks
    maps = [
        TokenBlockPlan(*choose(call, *keys, rule, grid, tile), grid, tile, call.q.shape[1], *rules).blocks()
        for choose in (by_kernel, in_torch)
    ]
    return maps[0], maps[1]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("heads", GROUPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_choice_on_the_gpu(heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Sums round in another order, which shows only if two scores are almost equal."""
    for queries, head_dim, softcap in ((3000, 128, None), (700, 64, 20.0), (1, 256, None)):
        shape = {"heads": heads, "head_dim": head_dim, "dtype": dtype}
        call = on_gpu(make_call(3000, queries=queries, row_starts=[0, 77, 1900], softcap=softcap, **shape))
        for rule in (CompressedKeysParams(1, 4, 5, 7), CompressedKeysParams(0, 1, 0, 30)):
            found, expected = choices(call, rule, 4 if heads[0] > 16 else 8)
            assert torch.equal(found.sum(-1), expected.sum(-1))
            assert (found == expected).float().mean() > 0.9999


def test_equal_scores_and_slices_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal keys, so that only the tie rule decides; and slices of a few query blocks."""
    call = on_gpu(make_call(4000, heads=(32, 2), head_dim=64, dtype=torch.bfloat16))
    same = replace(call, k=torch.ones_like(call.k))
    found, expected = choices(same, CompressedKeysParams(1, 2, 0, 9), 4)
    assert torch.equal(found, expected)
    assert found[0, 0, 62, 31].nonzero().flatten().tolist() == [*range(10), 60, 61, 62]  # of the last token
    whole = choices(call, CompressedKeysParams(1, 2, 0, 9), 4)[0]
    monkeypatch.setattr("sparse_patch.ops.selection.compressed_keys.triton.prefill._SCORES_BYTES", 1 << 20)
    assert torch.equal(choices(call, CompressedKeysParams(1, 2, 0, 9), 4)[0], whole)


def test_long_prompts_in_chunks_on_the_gpu() -> None:
    """Published settings at 20k tokens: chunks choose and compute what the whole prompt does; no query is left out."""
    call = on_gpu(make_call(20000, heads=(32, 2), head_dim=128, row_starts=[0, 3001], dtype=torch.bfloat16))
    method = InfLLMv2()
    plan = bound(method).plan(call)
    assert isinstance(plan, TokenBlockPlan) and plan.density().max() < 0.7
    output = attend(call, plan)[0]
    assert output.isfinite().all()
    chunk = replace(call, q=call.q[:, :, 12345:], q_start=12345)
    part = bound(method).plan(chunk)
    assert isinstance(part, TokenBlockPlan)
    torch.testing.assert_close(attend(chunk, part)[0], output[:, :, 12345:], atol=3e-2, rtol=3e-2)
    last = replace(call, q=call.q[:, :, -64:], q_start=19936)
    plan = bound(method).plan(last)
    assert isinstance(plan, TokenBlockPlan)
    torch.testing.assert_close(attend(last, plan, "reference")[0], output[:, :, -64:], atol=3e-2, rtol=3e-2)


def test_beyond_32_bits() -> None:
    call = on_gpu(make_call(900, heads=(4, 2), head_dim=64, dtype=torch.bfloat16))
    rule = CompressedKeysParams(1, 1, 0, 3)
    far = torch.empty(2**31 + 2**24, dtype=torch.bfloat16, device="cuda")

    def run(call: AttentionCall) -> torch.Tensor:
        return attend(call, choose_blocks(call, page_means(call, 16), rule), "triton")[0]

    expected = run(call)
    for name in ("q", "k", "v"):
        x = getattr(call, name)
        apart = far.as_strided(x.shape, (0, 2**31 // (x.shape[1] - 1) // 64 * 64, 64, 1))
        assert torch.equal(run(replace(call, **{name: apart.copy_(x)})), expected)


def test_prompts_do_not_wait_for_the_gpu() -> None:
    call = on_gpu(make_call(3000, heads=(32, 2), head_dim=64, row_starts=[0, 70], dtype=torch.float16))
    method = InfLLMv2(topk=8, window_size=256, min_length=600)
    step = replace(call, q=call.q[:, :, -1:], q_start=2999, phase="decode")

    def forward() -> None:
        plan = bound(method).plan(call)
        assert isinstance(plan, TokenBlockPlan)
        attend(call, plan)
        plan.pairs_by_head  # noqa: B018
        bound(method).plan(step)

    forward()
    with no_waits():
        forward()


def test_generate_on_the_gpu() -> None:
    """Growing and static caches, with captured steps, give what the reference gives."""
    torch._dynamo.reset()
    model = llama().cuda()  # type: ignore[call-arg]
    ids = torch.randint(3, 90, (2, 470), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    settings = {"max_new_tokens": 20, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    both = {"both": TOKEN_METHODS[0].small, "on_unsupported": "error"}
    with patched(model, {**both, "backend": "reference"}):
        expected = torch.stack(model.generate(ids, attention_mask=mask, disable_compile=True, **settings).logits)
    with patched(model, both):
        for options in (
            {"past_key_values": growing_cache(model.config), "disable_compile": True},
            {"cache_implementation": "static"},
        ):
            found = torch.stack(model.generate(ids, attention_mask=mask, **options, **settings).logits)
            torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)
        assert sparsity_report(model).layers[0].prefill.sparse_calls == 2
    torch._dynamo.reset()
