"""Every backend of the page-decode op against the oracle, and the oracle against dense attention."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from builders.plans import random_pages
from calls import decode_call
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_patch.call import AttentionCall
from sparse_patch.errors import UnsupportedCallError
from sparse_patch.ops.attention.page_decode import attend, fastest, why_unsupported
from sparse_patch.ops.attention.page_decode.triton import page_decode_attention, tile_of
from sparse_patch.plans import PagePlan

FAST = ["torch", "triton"]
EVERYWHERE = ["reference", *FAST]
# Rounding of float32 logits of about 40, times values of 3; in half precision, of the output.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_matches(call: AttentionCall, plan: PagePlan, backend: str) -> None:
    expected, expected_lse, expected_logits = attend(call, plan, "reference", return_lse=True)
    output, lse, logits = attend(call, plan, backend, return_lse=True)
    assert output.dtype == call.q.dtype and output.shape == expected.shape
    assert lse is not None and expected_lse is not None
    tolerance = TOLERANCE[call.q.dtype]
    torch.testing.assert_close(output, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=1e-5)
    if not plan.wants_logits:
        assert logits is None
        without_lse = attend(call, plan, backend)
        assert without_lse.lse is None
        torch.testing.assert_close(without_lse.out, expected, atol=tolerance, rtol=tolerance)
        return
    assert logits is not None and expected_logits is not None
    assert logits.shape == (*call.q.shape[:2], call.kv_length) and logits.dtype == torch.float32
    for row, length in enumerate(call.lengths().tolist()):
        theirs, ours = expected_logits[row, :, :length], logits[row, :, :length]
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 keys, so that short calls have many tiles and splits."""
    module = "sparse_patch.ops.attention.page_decode.triton.tile_of"
    monkeypatch.setattr(module, lambda *arguments: replace(tile_of(*arguments), block_n=16))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("lists", [1, 2, 4])
@pytest.mark.parametrize("page_size", [1, 8, 16, 64])
def test_lists_pages_and_lengths(backend: str, lists: int, page_size: int) -> None:
    for length in sorted({1, max(page_size - 1, 1), page_size, page_size + 1, 300}):
        call = decode_call(length, heads=(4, 2))
        assert_matches(call, random_pages(call, lists, page_size, seed=length), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("wants_logits", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 1000])
def test_every_page_of_every_length(backend: str, wants_logits: bool, length: int) -> None:
    call = decode_call(length)
    assert_matches(call, PagePlan.every(call, wants_logits=wants_logits), backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (14, 2), (8, 1), (40, 1)], ids=str)
@pytest.mark.parametrize("lists", ["every", "one", "kv", "query"])
@pytest.mark.parametrize("queries", [1, 2])
def test_groups(backend: str, heads: tuple[int, int], lists: str, queries: int) -> None:
    call = decode_call(70, heads=heads, queries=queries)
    number = {"one": 1, "kv": heads[1], "query": heads[0]}.get(lists)
    plan = PagePlan.every(call, wants_logits=True) if number is None else random_pages(call, number, 16)
    assert_matches(call, plan, backend)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "head_dim, value_dim", [(8, 8), (64, 64), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256)]
)
def test_head_dims_and_dtypes(backend: str, dtype: torch.dtype, head_dim: int, value_dim: int) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 wrongly; tests/test_gpu.py has it")
    call = decode_call(90, head_dim=head_dim, value_dim=value_dim, dtype=dtype, tail=10)
    assert_matches(call, PagePlan.every(call), backend)
    assert_matches(call, random_pages(call, 2, 16), backend)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("queries", [1, 2, 5, 16])
@pytest.mark.parametrize("tail, softcap", [(None, None), (70, 2.0)])
def test_ragged_batches_static_buffers_and_softcap(
    backend: str, queries: int, tail: int | None, softcap: float | None
) -> None:
    """Rows have 90, 57 and 3 keys; with 5 queries, the first queries of the last row are padding."""
    call = decode_call(90, queries=queries, row_starts=[0, 33, 87], tail=tail, softcap=softcap, heads=(6, 2))
    assert_matches(call, PagePlan.every(call, wants_logits=True), backend)
    for lists, page_size in ((1, 8), (2, 8), (6, 1)):
        assert_matches(call, random_pages(call, lists, page_size, most=40), backend)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("queries", [1, 4])
def test_every_page_equals_dense_attention(backend: str, queries: int) -> None:
    call = decode_call(333, queries=queries, heads=(8, 2), head_dim=64)
    causal = torch.ones(queries, 333, dtype=torch.bool).tril(333 - queries)
    expected = F.scaled_dot_product_attention(call.q, call.k, call.v, causal, scale=call.scale, enable_gqa=True)
    output, lse, logits = attend(call, PagePlan.every(call), backend)
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-5)
    assert lse is None and logits is None


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_what_is_not_listed_and_what_is_not_valid_changes_nothing(backend: str) -> None:
    call = decode_call(200, row_starts=[0, 37], tail=56, queries=3)
    pages = torch.tensor([[[3, 0, 12]], [[9, 2, 10]]], dtype=torch.int32)  # the last pages are partial
    plan = PagePlan.of(call, pages, torch.tensor([[3], [3]], dtype=torch.int32), 16)
    expected, _, _ = attend(call, plan, backend)
    assert expected.isfinite().all()
    unread = ~plan.mask().any(2).any(1)  # [B, capacity]
    for poison in (torch.nan, 1e4, -1e4):
        k, v = (x.masked_fill(unread[:, None, :, None], poison) for x in (call.k, call.v))
        assert torch.equal(attend(replace(call, k=k, v=v), plan, backend)[0], expected)
    seen = plan.mask().any(2).any(1)
    moved = replace(call, v=call.v + 1e3 * seen[:, None, :, None])
    assert (attend(moved, plan, backend)[0] != expected).all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", FAST)
def test_the_order_of_a_list_does_not_matter(backend: str) -> None:
    call = decode_call(500, heads=(4, 2))
    ascending = torch.arange(0, 120, 2, dtype=torch.int32).expand(1, 2, -1)
    counts = torch.full((1, 2), ascending.shape[-1], dtype=torch.int32)
    shuffled = ascending[..., torch.randperm(ascending.shape[-1])]
    expected, lse, _ = attend(call, PagePlan.of(call, ascending, counts, 4), backend, return_lse=True)
    output, shuffled_lse, _ = attend(call, PagePlan.of(call, shuffled, counts, 4), backend, return_lse=True)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shuffled_lse, lse, atol=1e-6, rtol=1e-6)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("lists", [1, 2])
def test_a_list_of_all_pages_reads_like_dense_to_the_bit(page_size: int, lists: int) -> None:
    call = decode_call(200, row_starts=[0, 45], tail=8, queries=2)
    pages = torch.arange(-(-208 // page_size), dtype=torch.int32).expand(2, lists, -1)
    counts = -(-call.lengths()[:, None].expand(2, lists) // page_size)
    dense = attend(call, PagePlan.every(call), "triton", return_lse=True)
    listed = attend(call, PagePlan.of(call, pages, counts.int(), page_size), "triton", return_lse=True)
    assert torch.equal(dense[0], listed[0]) and torch.equal(dense[1], listed[1])


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_queries_without_a_key_give_zero(backend: str) -> None:
    call = decode_call(40, queries=4, row_starts=[0, 38, 40], tail=24)
    counts = torch.tensor([[0, 2], [1, 0], [0, 0]], dtype=torch.int32)
    pages = torch.tensor([1, 0], dtype=torch.int32).expand(3, 2, 2)
    for plan in (PagePlan.every(call), PagePlan.of(call, pages, counts, 16)):
        output, lse, _ = attend(call, plan, backend, return_lse=True)
        empty = ~plan.mask().any(-1)
        assert empty.any() and not empty.all() and lse is not None
        assert output[empty].eq(0).all() and output[~empty].isfinite().all() and output[~empty].ne(0).all()
        assert torch.equal(lse.isneginf(), empty) and lse[~empty].isfinite().all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("splits", [1, 2, 3, 12])
def test_splits_change_nothing(splits: int) -> None:
    """This includes more splits than tiles, and rows that are much shorter than others."""
    call = decode_call(130, queries=2, row_starts=[0, 90, 127], heads=(2, 1))
    for plan in (PagePlan.every(call, wants_logits=True), random_pages(call, 1, 8)):
        expected, lse, logits = attend(call, plan, "reference", return_lse=True)
        lists = (plan.pages, plan.counts, call.kv_start, call.kv_end)
        options = (call.scale, 0.0, plan.page_size, plan.wants_logits, splits)
        found = page_decode_attention(call.q, call.k, call.v, *lists, *options)
        torch.testing.assert_close(found[0], expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(found[1], lse, atol=2e-5, rtol=1e-5)
        if logits is not None:
            torch.testing.assert_close(found[2][0], logits[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_lse_normalizes_the_logits(backend: str, softcap: float | None) -> None:
    call = decode_call(100, row_starts=[0, 30], tail=28, softcap=softcap)
    _, lse, logits = attend(call, PagePlan.every(call, wants_logits=True), backend)
    assert lse is not None and logits is not None
    for row, length in enumerate((100, 70)):
        probabilities = torch.exp(logits[row, :, :length] - lse[row, :, -1:])
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", FAST)
def test_strides(backend: str) -> None:
    """Views of larger buffers, batch and heads swapped, and a last dimension that is not contiguous."""
    call = decode_call(150, row_starts=[0, 20], heads=(4, 2))
    plan = random_pages(call, 2, 16)
    expected, _, _ = attend(call, plan, "reference")
    wide = torch.full((2, 2, 200, 50), torch.nan)
    inside = wide[:, :, 13:163, 7:23]
    for moved in (
        replace(call, k=inside.copy_(call.k)),
        replace(call, v=call.v.transpose(0, 1).contiguous().transpose(0, 1)),
        replace(call, v=call.v.transpose(1, 2).contiguous().transpose(1, 2)),
        replace(call, k=call.k.mT.contiguous().mT, v=call.v.mT.contiguous().mT, q=call.q.mT.contiguous().mT),
    ):
        torch.testing.assert_close(attend(moved, plan, backend)[0], expected, atol=2e-5, rtol=2e-5)
    spread = replace(plan, pages=plan.pages.mT.contiguous().mT, counts=plan.counts.mT.contiguous().mT)
    torch.testing.assert_close(attend(call, spread, backend)[0], expected, atol=2e-5, rtol=2e-5)


def step(
    backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: torch.Tensor, pages: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One decode step over a static buffer, with a batch of two rows."""
    starts = torch.tensor([0, 9], device=q.device)
    call = AttentionCall(q, k, v, 0.3, 0, "decode", kv_start=starts, kv_end=end)
    if pages is None:
        output, _, logits = attend(call, PagePlan.every(call, wants_logits=True), backend)
        return output, logits
    counts = torch.full(pages.shape[:2], pages.shape[2], dtype=torch.int32, device=q.device)
    return attend(call, PagePlan.of(call, pages, counts, 8), backend)[:2]


def step_arguments() -> tuple[torch.Tensor, ...]:
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 96, 16), torch.randn(2, 2, 96, 16)
    return q, k, v, torch.tensor(70), torch.tensor([5, 0, 7]).int().expand(2, 1, 3).contiguous()


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("every", [True, False])
def test_no_value_is_read_on_the_host(backend: str, every: bool) -> None:
    with FakeTensorMode() as mode:  # reading a value raises
        *tensors, pages = (mode.from_tensor(x) for x in step_arguments())
        output, _ = step(backend, *tensors, None if every else pages)
        assert output.shape == (2, 4, 1, 16)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("every", [True, False])
def test_compiles_in_one_graph(backend: str, every: bool) -> None:
    *tensors, pages = step_arguments()
    arguments = (backend, *tensors, None if every else pages)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments)[0], step(*arguments)[0], atol=1e-6, rtol=1e-6)


def test_the_custom_op_is_sound() -> None:
    """Its fake has the shapes, dtypes and strides of the real one."""
    q, k, v, end, pages = step_arguments()
    counts = torch.full((2, 1), 3, dtype=torch.int32)
    torch.library.opcheck(page_decode_attention.op, (q, k, v, pages, counts, None, end, 0.3, 0.0, 8, False))
    torch.library.opcheck(page_decode_attention.op, (q, k, v, None, None, None, end + 26, 0.3, 1.0, 1, True))


def test_backends_say_what_they_do_not_serve() -> None:
    call = decode_call(20, head_dim=272)
    plan = PagePlan.every(call)
    assert fastest(call, plan) == "torch" and why_unsupported(call, plan, "auto") is None
    assert why_unsupported(call, plan, "triton") == "backend triton: head_dim 272 is above 256"
    with pytest.raises(UnsupportedCallError, match="head_dim 272"):
        attend(call, plan, "triton")
    negative = replace(decode_call(20), scale=-1.0)
    assert why_unsupported(negative, plan, "triton") == "backend triton: scale -1.0 is not positive"
