"""The kernel of MoA's search on a GPU; skipped without a GPU."""

import pytest
import torch

from sparse_patch.calibration.moa.influence import influence, influence_in_torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("length, heads", [(37, (2, 2)), (500, (14, 2)), (1337, (8, 2)), (1024, (4, 1))], ids=str)
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (128, 128), (96, 64), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_influence_on_the_gpu(
    length: int, heads: tuple[int, int], head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(heads[0], head_dim), (heads[1], head_dim), (heads[1], value_dim), (heads[0], value_dim)]
    q, k, v, grad = (torch.randn(n, length, d, generator=generator, device="cuda").to(dtype) for n, d in sizes)
    scale = 2 * head_dim**-0.5
    out = torch.nn.functional.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=True
    )[0]
    found = influence(q, k, v, out, grad, scale)
    expected = influence_in_torch(*(x.double() for x in (q, k, v, out, grad)), scale)
    for name in ("sink", "moa", "set"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-3, atol=1e-3)
