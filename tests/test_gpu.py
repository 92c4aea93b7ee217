"""What only a GPU can show; skipped without one."""

import json
from pathlib import Path

import pytest
import torch
from calls import make_call
from families import FAMILIES

from sparse_patch import patched, sparsity_report
from sparse_patch.call import AttentionCall
from sparse_patch.methods.a_shape import AShape
from sparse_patch.methods.flexprefill import FlexPrefill
from sparse_patch.methods.minference import MInference
from sparse_patch.ops import dense
from sparse_patch.ops.block_sparse import attend
from sparse_patch.plans import BlockGrid, BlockPlan

pytestmark = pytest.mark.gpu
SPARSE = {"prefill": {"method": "flexprefill", "block_size": 16, "min_budget": 16, "gamma": 0.5, "min_length": 0}}


def on_gpu(call: AttentionCall) -> AttentionCall:
    return AttentionCall(
        **{key: value.cuda() if torch.is_tensor(value) else value for key, value in vars(call).items()}
    )


@pytest.mark.parametrize("selection", ["reference", "coverage"])
@pytest.mark.parametrize("row_starts", [None, [0, 77, 300]], ids=["plain", "padded"])
def test_plans_on_the_gpu_equal_plans_on_the_cpu(selection: str, row_starts: list[int] | None) -> None:
    method = FlexPrefill(gamma=0.8, tau=0.2, min_budget=32, block_size=32, min_length=0, selection=selection)
    call = make_call(900, queries=500, row_starts=row_starts)
    expected, plan = method.plan(call), method.plan(on_gpu(call))
    assert isinstance(expected, BlockPlan) and isinstance(plan, BlockPlan)
    assert (plan.blocks().cpu() != expected.blocks()).float().mean() < 0.002  # sums round in another order


HEADS = [
    ["vertical_and_slash", 60, 120],
    ["stream_llm", 20, 100],
    ["block_sparse", 0, 0],
    ["vertical_and_slash", 30, 150],
]


def mixed_heads(folder: Path) -> MInference:
    """A method of which each head of layer 0 has another pattern."""
    (folder / "p.json").write_text(json.dumps([{str(head): [*entry, 1.0] for head, entry in enumerate(HEADS)}]))
    return MInference(calibration=str(folder / "p.json"), block_budget=128, block_size=32, min_length=0)


@pytest.mark.parametrize("name", ["flexprefill", "minference", "a_shape"])
def test_planning_never_waits_for_the_gpu(name: str, tmp_path: Path) -> None:
    methods = {
        "flexprefill": FlexPrefill(gamma=0.8, tau=0.2, min_budget=32, block_size=32, min_length=0),
        "minference": mixed_heads(tmp_path),
        "a_shape": AShape(sink=20, window=100, last=40, block_size=32, min_length=0),
    }
    call = on_gpu(make_call(900, row_starts=[0, 77]))
    assert isinstance(methods[name].plan(call), BlockPlan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        methods[name].plan(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_mixed_heads_on_the_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    """The plan is the CPU's but for ties, and the fast kernel reads what it says."""
    method = mixed_heads(tmp_path)
    call = make_call(900, queries=500, row_starts=[0, 77, 300], dtype=dtype, head_dim=64)
    expected, plan = method.plan(call), method.plan(on_gpu(call))
    assert isinstance(expected, BlockPlan) and isinstance(plan, BlockPlan)
    assert (plan.mask().cpu() != expected.mask()).float().mean() < 0.005  # sums round in another order
    output, reference = attend(on_gpu(call), plan)[0], attend(on_gpu(call), plan, "reference")[0]
    torch.testing.assert_close(output, reference, atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_ops_on_the_gpu(backend: str, dtype: torch.dtype) -> None:
    call = make_call(500, queries=300, row_starts=[0, 40], dtype=dtype, head_dim=64)
    method = FlexPrefill(gamma=0.8, min_budget=32, block_size=32, min_length=0)
    plan = method.plan(on_gpu(call))
    assert isinstance(plan, BlockPlan)
    output, _ = attend(on_gpu(call), plan, backend)
    expected, _ = attend(on_gpu(call), plan, "reference")
    torch.testing.assert_close(output, expected, atol=1.6e-2, rtol=1.6e-2)


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
    if reason := dense.unsupported(call, kernel):
        pytest.skip(reason)
    expected, _ = attend(call, every_block(call), "reference")
    torch.testing.assert_close(dense.attend(call, kernel), expected, atol=1.6e-2, rtol=1.6e-2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_dense_best_on_the_gpu(family: str) -> None:
    """Close to the unpatched model, and on another kernel wherever one serves these small heads."""
    model = FAMILIES[family]().cuda().bfloat16()
    ids = torch.randint(3, 90, (2, 200), device="cuda")
    with torch.no_grad():
        expected = model(ids).logits
        with patched(model, "dense.yaml", dense="best"):
            torch.testing.assert_close(model(ids).logits, expected, atol=5e-2, rtol=5e-2)
            kernels = {name for layer in sparsity_report(model).layers for name in layer.prefill.dense_kernels}
    assert kernels <= {"flash4", "cudnn", "flash2"}
