"""What only a GPU can show; skipped without a GPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bound import bound
from builders.gpu import no_waits, on_gpu
from builders.plans import random_blocks, random_pages
from calls import decode_call, make_call
from families import FAMILIES
from method_table import SMALL_MODEL

from sparse_patch import patched, sparsity_report
from sparse_patch.call import AttentionCall
from sparse_patch.methods.a_shape import AShape
from sparse_patch.methods.base.bound import BoundMethod
from sparse_patch.methods.base.settings import PrefillMethod
from sparse_patch.methods.flexprefill import FlexPrefill
from sparse_patch.methods.minference import MInference
from sparse_patch.methods.sale import Sale
from sparse_patch.methods.spargeattn import SpargeAttn
from sparse_patch.methods.xattention import XAttention
from sparse_patch.ops.attention import dense, page_decode
from sparse_patch.ops.attention.block_sparse import attend, why_unsupported
from sparse_patch.ops.attention.block_sparse.triton import block_sparse_attention
from sparse_patch.ops.selection.antidiagonal import block_masses
from sparse_patch.ops.selection.low_bit_scores import LowBitParams, Numerics, decisions, unpacked
from sparse_patch.plans import BlockGrid, BlockPlan, PagePlan

pytestmark = pytest.mark.gpu
SPARSE = {"prefill": {"method": "flexprefill", "block_size": 16, "min_budget": 16, "gamma": 0.5, "min_length": 0}}


@pytest.mark.parametrize("selection", ["reference", "coverage"])
@pytest.mark.parametrize("row_starts", [None, [0, 77, 300]], ids=["plain", "padded"])
def test_plans_on_the_gpu_equal_plans_on_the_cpu(selection: str, row_starts: list[int] | None) -> None:
    method = FlexPrefill(gamma=0.8, tau=0.2, min_budget=32, block_size=32, min_length=0, selection=selection)
    call = make_call(900, queries=500, row_starts=row_starts)
    expected, plan = bound(method).plan(call), bound(method).plan(on_gpu(call))
    assert isinstance(expected, BlockPlan) and isinstance(plan, BlockPlan)
    assert (plan.blocks().cpu() != expected.blocks()).float().mean() < 0.002  # sums round in another order


def test_wide_heads_on_the_gpu() -> None:
    method = FlexPrefill(gamma=0.8, tau=0.2, min_budget=32, block_size=32, min_length=0)
    call = make_call(900, queries=500, head_dim=512)
    expected, plan = bound(method).plan(call), bound(method).plan(on_gpu(call))
    assert isinstance(expected, BlockPlan) and isinstance(plan, BlockPlan)
    assert (plan.blocks().cpu() != expected.blocks()).float().mean() < 0.002


@pytest.mark.parametrize("selection", ["topk", "cdf"])
@pytest.mark.parametrize("row_starts", [None, [0, 77, 300]], ids=["plain", "padded"])
def test_means_that_are_alike_on_the_gpu(selection: str, row_starts: list[int] | None) -> None:
    method = SpargeAttn(selection=selection, similarity_threshold=0.5, topk=0.3, block_size=32, min_length=0)
    call = make_call(900, queries=500, row_starts=row_starts)
    expected, plan = bound(method).plan(call), bound(method).plan(on_gpu(call))
    assert isinstance(expected, BlockPlan) and isinstance(plan, BlockPlan)
    assert (plan.blocks().cpu() != expected.blocks()).float().mean() < 0.002  # sums round in another order


HEADS = [
    ["vertical_and_slash", 60, 120],
    ["stream_llm", 20, 100],
    ["block_sparse", 0, 0],
    ["vertical_and_slash", 30, 150],
]


def mixed_heads(folder: Path) -> BoundMethod:
    """A method with a different pattern for each head of layer 0."""
    (folder / "p.json").write_text(json.dumps([{str(head): [*entry, 1.0] for head, entry in enumerate(HEADS)}]))
    method = MInference(calibration=str(folder / "p.json"), block_budget=128, block_size=32, min_length=0)
    return method.bind(replace(SMALL_MODEL, num_layers=1))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("block_size, stride", [(128, 16), (128, 1), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_antidiagonal_masses_on_the_gpu(backend: str, block_size: int, stride: int, dtype: torch.dtype) -> None:
    call = make_call(3000, queries=2500, row_starts=[0, 77], dtype=dtype, head_dim=80)
    grid, gpu_grid = BlockGrid.of(call, block_size), BlockGrid.of(on_gpu(call), block_size)
    expected = [masses for _, masses in block_masses(call, grid, stride)]
    found = [masses for _, masses in block_masses(on_gpu(call), gpu_grid, stride, backend)]
    # PyTorch rounds logits of about 20 to bfloat16, 0.06 apart
    atol = 2e-5 if dtype == torch.float32 else 1e-3 if backend == "triton" else 0.03
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=atol, rtol=1e-3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("numerics", ["int8", "int4"])
@pytest.mark.parametrize("dtype, head_dim, softcap", [
    (torch.bfloat16, 128, None), (torch.float16, 80, 20.0), (torch.float32, 64, None), (torch.bfloat16, 256, None),
])  # fmt: skip
def test_decisions_on_the_gpu(
    backend: str, numerics: Numerics, dtype: torch.dtype, head_dim: int, softcap: float | None
) -> None:
    call = make_call(
        3000, queries=2500, row_starts=[0, 77], dtype=dtype, head_dim=head_dim, softcap=softcap, sharpness=0.7
    )
    rule, tau = LowBitParams(numerics, 128), torch.tensor([2e-4, 1e-3, 4e-3, 0.0])
    expected = unpacked(decisions(call, tau, rule, "torch"))
    bits = unpacked(decisions(on_gpu(call), tau.cuda(), rule, backend)).cpu()
    # Sums round in another order; the int4 mode rounds estimate and limit to the dtype.
    assert (bits != expected).float().mean() < (2e-4 if numerics == "int8" else 2e-3)
    assert 0.1 < expected[:, 1:3].float().mean() < 0.5


@pytest.mark.parametrize(
    "name", ["flexprefill", "coverage", "xattention", "spargeattn", "sale", "minference", "a_shape"]
)
def test_planning_never_waits_for_the_gpu(name: str, tmp_path: Path) -> None:
    flexprefill = {"gamma": 0.8, "tau": 0.2, "min_budget": 32, "block_size": 32, "min_length": 0}
    methods: dict[str, PrefillMethod | BoundMethod] = {
        "flexprefill": FlexPrefill(**flexprefill, selection="reference"),
        "coverage": FlexPrefill(**flexprefill, selection="coverage"),
        "xattention": XAttention(threshold=0.8, stride=8, block_size=32, min_length=0),
        "spargeattn": SpargeAttn(topk=0.3, similarity_threshold=0.5, block_size=32, min_length=0),
        "minference": mixed_heads(tmp_path),
        "a_shape": AShape(sink=20, window=100, last=40, block_size=32, min_length=0),
        "sale": Sale(tau=0.5, window=32, min_length=0),
    }
    call = on_gpu(make_call(900, row_starts=[0, 77]))
    assert isinstance(bound(methods[name]).plan(call), BlockPlan)
    with no_waits():
        plan = bound(methods[name]).plan(call)
        assert isinstance(plan, BlockPlan)
        attend(call, plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mixed_heads_on_the_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    """Except for ties, the plan is the CPU's; the fast kernel reads exactly the plan."""
    method = mixed_heads(tmp_path)
    call = make_call(900, queries=500, row_starts=[0, 77, 300], dtype=dtype, head_dim=64)
    expected, plan = bound(method).plan(call), bound(method).plan(on_gpu(call))
    assert isinstance(expected, BlockPlan) and isinstance(plan, BlockPlan)
    assert (plan.mask().cpu() != expected.mask()).float().mean() < 0.005  # sums round in another order
    output, reference = attend(on_gpu(call), plan)[0], attend(on_gpu(call), plan, "reference")[0]
    torch.testing.assert_close(output, reference, atol=1.6e-2, rtol=1.6e-2)


def assert_close(call: AttentionCall, plan: BlockPlan, backend: str) -> None:
    """Check the relative error of the whole output, and that no element is left unwritten."""
    output, lse, _ = attend(call, plan, backend, return_lse=True)
    expected, expected_lse, _ = attend(call, plan, "reference", return_lse=True)
    assert lse is not None and expected_lse is not None and not output.isnan().any()
    error = (output - expected).float().norm() / expected.float().norm()
    assert error < (1e-5 if call.q.dtype == torch.float32 else 5e-3)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("block_size", [32, 128])
def test_tiles_are_left_out_on_the_gpu(head_dim: int, block_size: int) -> None:
    """No logit comes near the threshold, so rounding decides nothing: keys are small or large."""
    call = make_call(1100, queries=900, row_starts=[0, 77], head_dim=head_dim, dtype=torch.bfloat16)
    size = torch.where(torch.arange(1100) < 300, 4.0, 0.01)[:, None].bfloat16()
    call = on_gpu(AttentionCall(**{**vars(call), "k": call.k * size}))
    plan = replace(random_blocks(call, block_size, 0.7), pv_threshold=2.0)
    assert_close(call, plan, "triton")
    _, lse, _ = attend(call, plan, "triton", return_lse=True)
    _, whole, _ = attend(call, replace(plan, pv_threshold=None), "triton", return_lse=True)
    assert lse is not None and whole is not None and not torch.allclose(lse, whole, atol=1e-3)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["triton", "flash"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1), (8, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_block_sparse_on_the_gpu(backend: str, head_dim: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    for length, queries, row_starts, block_size, columns in (
        (1, 1, None, 128, None),
        (127, 127, None, 128, None),
        (128, 128, None, 128, None),
        (1025, 1025, None, 128, None),
        (1024, 512, None, 128, None),
        (700, 333, [0, 40, 300], 64, 50),
    ):
        call = on_gpu(
            make_call(length, queries=queries, row_starts=row_starts, heads=heads, head_dim=head_dim, dtype=dtype)
        )
        plan = random_blocks(call, block_size, 0.4, columns=columns)
        if backend != "flash" or why_unsupported(call, plan, "flash") is None:
            assert_close(call, plan, backend)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_block_sparse_in_float32(softcap: float | None) -> None:
    call = on_gpu(make_call(500, queries=300, row_starts=[0, 40], head_dim=128, softcap=softcap))
    assert_close(call, random_blocks(call, 64, 0.4, columns=30), "triton")


def test_addresses_beyond_32_bits() -> None:
    call = on_gpu(make_call(300, heads=(2, 2), head_dim=64, dtype=torch.bfloat16))
    plan = random_blocks(call, 64, 0.5, columns=20)
    far = torch.empty(2**31 + 2**24, dtype=torch.bfloat16, device="cuda")
    heads_apart = far.as_strided(call.k.shape, (0, 2**31, 64, 1))
    queries_apart = far.as_strided(call.q.shape, (0, 64, 2**31 // 299 // 8 * 8, 1))
    for name, place in (("k", heads_apart), ("v", heads_apart), ("q", queries_apart)):
        moved = replace(call, **{name: place.copy_(getattr(call, name))})
        assert torch.equal(attend(moved, plan, "triton")[0], attend(call, plan, "triton")[0])


def test_compiled_and_captured_calls_give_the_same() -> None:
    call = on_gpu(make_call(600, heads=(8, 2), head_dim=64, dtype=torch.bfloat16))
    plan = random_blocks(call, 128, 0.4)
    expected, _, _ = attend(call, plan, "triton")

    def run(q: torch.Tensor) -> torch.Tensor:
        lists = (plan.indices, plan.counts, plan.columns, plan.column_counts, call.kv_start)
        return block_sparse_attention(q, call.k, call.v, *lists, call.scale, 0.0, 128, call.q_start, None, False)[0]

    assert torch.equal(torch.compile(run, fullgraph=True)(call.q), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call.q)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_the_dense_config_equals_unpatched(family: str, cache: str) -> None:
    """With a static cache Transformers compiles the decode step on a GPU."""
    model = FAMILIES[family]().cuda()
    ids = torch.randint(3, 90, (2, 60), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def steps(net: torch.nn.Module) -> torch.Tensor:
        result = net.generate(ids, attention_mask=mask, cache_implementation=cache, **options)
        return torch.stack(result.logits)

    expected = steps(model)
    with patched(model, "dense.yaml"):
        torch.testing.assert_close(steps(model), expected, atol=1e-4, rtol=1e-4)
    with patched(model, SPARSE):
        assert steps(model).isfinite().all()
        assert any(layer.prefill.sparse_calls for layer in sparsity_report(model).layers)


def every_block(call: AttentionCall) -> BlockPlan:
    grid = BlockGrid.of(call, 128)
    shape = (*call.q.shape[:2], grid.num_query_blocks, grid.num_key_blocks)
    return BlockPlan.from_blocks(torch.ones(shape, dtype=torch.bool, device=call.q.device), grid)


@pytest.mark.parametrize("kernel", dense.KERNELS)
@pytest.mark.parametrize("heads, head_dim", [((8, 8), 64), ((8, 2), 128), ((7, 1), 128)])
@pytest.mark.parametrize("queries", [700, 333])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dense_kernels_against_the_reference(
    kernel: str, heads: tuple[int, int], head_dim: int, queries: int, dtype: torch.dtype
) -> None:
    call = on_gpu(make_call(700, queries=queries, heads=heads, head_dim=head_dim, dtype=dtype))
    if reason := dense.why_unsupported(call, kernel):
        pytest.skip(reason)
    expected, _, _ = attend(call, every_block(call), "reference")
    torch.testing.assert_close(dense.attend(call, kernel).out, expected, atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_dense_best_on_the_gpu(family: str) -> None:
    """The logits are close to the unpatched model's; another kernel runs if one serves these small heads."""
    model = FAMILIES[family]().cuda().bfloat16()
    ids = torch.randint(3, 90, (2, 200), device="cuda")
    with torch.no_grad():
        expected = model(ids).logits
        with patched(model, "dense.yaml", dense="best"):
            torch.testing.assert_close(model(ids).logits, expected, atol=5e-2, rtol=5e-2)
            kernels = {name for layer in sparsity_report(model).layers for name in layer.prefill.dense_kernels}
    assert kernels <= {"flash4", "cudnn", "flash2"}


def assert_pages_close(call: AttentionCall, plan: PagePlan) -> None:
    """Check the relative error of the whole output, each LSE and logit, and that nothing is left unwritten."""
    output, lse, logits = page_decode.attend(call, plan, "triton", return_lse=True)
    expected, expected_lse, expected_logits = page_decode.attend(call, plan, "reference", return_lse=True)
    assert lse is not None and not output.isnan().any()
    error = (output - expected).float().norm() / expected.float().norm().clamp(min=1e-6)
    assert error < (1e-5 if call.q.dtype == torch.float32 else 5e-3)
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-3)
    if logits is not None and expected_logits is not None:
        for row, length in enumerate(call.lengths().tolist()):
            theirs, ours = expected_logits[row, :, :length], logits[row, :, :length]
            torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "head_dim, value_dim", [(16, 16), (64, 64), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256)]
)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1), (8, 1), (32, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_page_decode_on_the_gpu(head_dim: int, value_dim: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    shape = {"heads": heads, "head_dim": head_dim, "value_dim": value_dim, "dtype": dtype}
    for length, queries, row_starts, tail, softcap, page_size in (
        (1, 1, None, None, None, 16),
        (64, 1, None, 64, None, 64),
        (1000, 1, None, None, 5.0, 1),
        (5000, 1, [0, 4000, 4990], 300, None, 16),
        (700, 16, [0, 300, 695], 30, None, 8),
    ):
        call = on_gpu(decode_call(length, queries=queries, row_starts=row_starts, tail=tail, softcap=softcap, **shape))
        assert_pages_close(call, PagePlan.every(call, wants_logits=True))
        for lists in {1, heads[1], heads[0]}:
            assert_pages_close(call, random_pages(call, lists, page_size))


def test_page_decode_beyond_32_bits() -> None:
    call = on_gpu(decode_call(300, heads=(2, 2), head_dim=64, dtype=torch.bfloat16))
    far = torch.empty(2**31 + 2**24, dtype=torch.bfloat16, device="cuda")
    heads_apart = far.as_strided(call.k.shape, (0, 2**31, 64, 1))
    keys_apart = far[: 2**31].as_strided(call.k[:, :1].shape, (0, 0, 2**31 // 299 // 8 * 8, 1))
    one_head = replace(call, k=call.k[:, :1], v=call.v[:, :1])
    for plain, places in ((call, heads_apart), (one_head, keys_apart)):
        for name in ("k", "v"):
            moved = replace(plain, **{name: places.copy_(getattr(plain, name))})
            for plan in (PagePlan.every(plain), random_pages(plain, 1, 16)):
                found, expected = (page_decode.attend(x, plan, "triton")[0] for x in (moved, plain))
                assert torch.equal(found, expected)


@pytest.mark.parametrize("every", [True, False])
def test_a_captured_decode_step_serves_every_length(every: bool) -> None:
    """The graph of one length is replayed after keys, lists and lengths changed in place, without a host sync."""
    call = on_gpu(decode_call(3000, row_starts=[0, 70], tail=1000, heads=(8, 2), head_dim=128, dtype=torch.bfloat16))
    assert call.kv_end is not None and call.kv_start is not None
    pages, counts = random_pages(call, 1, 16, most=64).pages, torch.full((2, 1), 50, dtype=torch.int32, device="cuda")
    assert pages is not None
    pages.clamp_(max=200)

    def run() -> torch.Tensor:
        plan = PagePlan.every(call, wants_logits=True) if every else PagePlan.of(call, pages, counts, 16)
        return page_decode.attend(call, plan, "triton")[0]

    run()
    with no_waits():
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for end in (3000, 3001, 3300, 4000, 100):
        call.kv_end.fill_(end)
        call.k[:, :, :end].normal_(), call.v[:, :, :end].normal_()
        call.k[:, :, end:], call.v[:, :, end:] = torch.nan, torch.nan
        if not every:
            chosen = torch.randperm(max((end - 70) // 16, 1), device="cuda")[:30].int()
            pages[:, :, : len(chosen)], counts[:] = chosen, len(chosen)
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, run()) and captured.isfinite().all()


@pytest.mark.parametrize("every", [True, False])
def test_a_compiled_decode_step_is_one_graph(every: bool) -> None:
    call = on_gpu(decode_call(900, row_starts=[0, 70], tail=100, heads=(8, 2), head_dim=64, dtype=torch.bfloat16))
    listed = random_pages(call, 2, 16)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        now = AttentionCall(q, k, v, call.scale, 0, "decode", kv_start=call.kv_start, kv_end=end)
        plan = PagePlan.every(now)
        if not every:
            assert listed.pages is not None and listed.counts is not None
            plan = PagePlan.of(now, listed.pages, listed.counts, 16)
        return page_decode.attend(now, plan)[0]

    arguments = (call.q, call.k, call.v, call.end())
    assert torch.equal(torch.compile(run, fullgraph=True)(*arguments), run(*arguments))
