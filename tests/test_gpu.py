"""What only a GPU can show; skipped without one."""

import pytest
import torch
from calls import make_call
from families import FAMILIES

from sparse_patch import patched, sparsity_report
from sparse_patch.call import AttentionCall
from sparse_patch.methods.flexprefill import FlexPrefill
from sparse_patch.methods.xattention import XAttention
from sparse_patch.ops.antidiagonal import block_masses
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


@pytest.mark.parametrize(
    "method",
    [
        FlexPrefill(gamma=0.8, tau=0.2, min_budget=32, block_size=32, min_length=0),
        XAttention(threshold=0.8, stride=8, block_size=32, min_length=0),
    ],
    ids=lambda method: method.method,
)
def test_planning_never_waits_for_the_gpu(method: FlexPrefill | XAttention) -> None:
    call = on_gpu(make_call(900, row_starts=[0, 77]))
    method.plan(call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.plan(call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
