"""The influence of not reading a key, checked against explicit float64 attention and through a whole model."""

from typing import Any

import pytest
import torch
from builders.model_state import fingerprint
from families import FAMILIES, llama

from sparse_patch.calibration.moa.hook import attention_by
from sparse_patch.calibration.moa.influence import (
    BLOCK,
    Influence,
    answer_loss,
    influence,
    influence_in_torch,
    influence_of_prompt,
)
from sparse_patch.calibration.moa.influence_triton import partial_influence
from sparse_patch.errors import TaskError
from sparse_patch.integration.patch import is_patched

SCALE = 0.3


def tensors(
    length: int, heads: tuple[int, int] = (4, 2), dims: tuple[int, int] = (8, 8), seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """The q, k, v and gradient of a call, float64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1]), (heads[0], dims[1])]
    return tuple(torch.randn(n, length, d, generator=generator, dtype=torch.float64) * 2 for n, d in sizes)


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Attention under the causal mask and a mask `[Hq, N, N]` of kept keys."""
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    hidden = hidden if kept is None else hidden | ~kept
    return (q @ k.transpose(-1, -2) * SCALE).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """|E| `[Hq, N, N]`; each entry is computed by masking one key and renormalising the row."""
    length = q.shape[1]
    result = torch.zeros(len(q), length, length, dtype=torch.float64)
    out = masked(q, k, v)
    for j in range(length):
        kept = torch.ones(length, length, dtype=torch.bool)
        kept[j + 1 :, j] = False
        if j:
            kept[j, j] = False
        result[:, :, j] = ((masked(q, k, v, kept) - out) * grad).sum(-1)
    return result.abs()


def distances(length: int) -> torch.Tensor:
    """Number of tokens between query and key; negative for the future."""
    return torch.arange(length)[:, None] - torch.arange(length)


def of_group(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    return x.unflatten(0, (kv_heads, -1)).sum(1)


@pytest.mark.parametrize("length, heads, dims", [(64, (4, 2), (8, 8)), (50, (3, 1), (8, 12)), (37, (2, 2), (5, 8))])
def test_within_a_block_everything_is_sink(length: int, heads: tuple[int, int], dims: tuple[int, int]) -> None:
    q, k, v, grad = tensors(length, heads, dims)
    found = influence(q, k, v, masked(q, k, v), grad, SCALE)
    expected = of_group(by_hand(q, k, v, grad).sum((1, 2)), heads[1])
    torch.testing.assert_close(found.sink, expected, rtol=1e-9, atol=1e-9)
    assert found.moa.abs().max() == 0 and found.set.abs().max() == 0


@pytest.mark.parametrize("length, heads", [(128, (2, 1)), (150, (4, 2)), (260, (2, 2))])
def test_suffixes_are_what_the_mask_of_a_window_drops(length: int, heads: tuple[int, int]) -> None:
    q, k, v, grad = tensors(length, heads)
    out = masked(q, k, v)
    found = influence(q, k, v, out, grad, SCALE)
    each = by_hand(q, k, v, grad)
    key = torch.arange(length)
    for blocks in range(found.moa.shape[1]):
        dropped = (key >= BLOCK) & (distances(length) >= BLOCK * blocks) & (distances(length) >= 0)
        expected = of_group((each * dropped).sum((1, 2)), heads[1])
        torch.testing.assert_close(found.moa[:, blocks], expected, rtol=1e-9, atol=1e-9)
        change = ((masked(q, k, v, ~dropped) - out) * grad).sum(-1).abs()
        torch.testing.assert_close(found.set[:, blocks], of_group(change.sum(1), heads[1]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.sink, of_group(each[..., :BLOCK].sum((1, 2)), heads[1]), rtol=1e-9, atol=1e-9)
    assert (found.moa[:, -1] == 0).all() and (found.set[:, -1] == 0).all(), "a window of all but the sink drops nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "length, heads, dims", [(64, (2, 1), (16, 16)), (150, (4, 2), (24, 40)), (321, (3, 1), (64, 64))]
)
def test_the_kernel_is_what_torch_computes(
    length: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype
) -> None:
    q, k, v, grad = (x.to(dtype) for x in tensors(length, heads, dims))
    q = (q / 4).transpose(0, 1).contiguous().transpose(0, 1)  # strides as Transformers hands them over
    out = masked(*(x.double() for x in (q, k, v))).to(dtype)
    expected = influence_in_torch(*(x.double() for x in (q, k, v, out, grad)), SCALE)
    sums = partial_influence(q, k, v, out, grad, SCALE, BLOCK, 1e-6)
    for found, name in zip(sums, ("sink", "moa", "set"), strict=True):
        torch.testing.assert_close(of_group(found, heads[1]), getattr(expected, name), rtol=1e-4, atol=1e-3)


def test_half_precision_is_computed_in_float32() -> None:
    q, k, v, grad = tensors(200)
    exact = influence(q, k, v, masked(q, k, v), grad, SCALE)
    half = [x.half() for x in (q, k, v, masked(q, k, v), grad)]
    for name in ("sink", "moa", "set"):
        found = getattr(influence(*half, SCALE), name)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, getattr(exact, name), rtol=2e-2, atol=1e-1)


def test_padding_on_the_right_changes_nothing() -> None:
    q, k, v, grad = tensors(150)
    grad[:, 140:] = 0
    padded = [torch.cat([x, torch.randn(len(x), 90, x.shape[-1], dtype=x.dtype)], 1) for x in (q, k, v, grad)]
    padded[3][:, 150:] = 0
    alone, more = (influence(a, b, c, masked(a, b, c), d, SCALE) for a, b, c, d in ((q, k, v, grad), padded))
    torch.testing.assert_close(more.sink, alone.sink)
    for name in ("moa", "set"):
        torch.testing.assert_close(getattr(more, name)[:, :3], getattr(alone, name))
        assert getattr(more, name)[:, 3:].abs().max() == 0


TOKENS = torch.randint(3, 90, (190,), generator=torch.Generator().manual_seed(3)).tolist()
ANSWER = [7, 9, 11]


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "phi3"])
def test_a_model_is_left_as_it_was_and_its_influence_is_that_of_its_gradients(family: str) -> None:
    """Check layer by layer against autograd's gradients of the outputs, without checkpoints."""
    model = FAMILIES[family]()
    next(model.parameters()).requires_grad_(False)
    before = fingerprint(model)
    found, loss = influence_of_prompt(model, TOKENS, ANSWER)
    assert fingerprint(model) == before and not is_patched(model)
    assert all(weight.grad is None for weight in model.parameters())
    seen: dict[int, tuple[Any, torch.Tensor]] = {}

    def keep(call: Any, dense: Any) -> torch.Tensor:
        out = dense()
        out.retain_grad()
        seen[call.layer] = call, out
        return out

    with attention_by(model, keep):
        expected = answer_loss(model, TOKENS, ANSWER)
        expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5) and sorted(found) == sorted(seen) == [0, 1, 2]
    for layer, (call, out) in seen.items():
        assert out.grad is not None
        q, k, v = (x[0].double().detach() for x in (call.q, call.k, call.v))
        rows = [x[0].transpose(0, 1).double().detach() for x in (out, out.grad)]
        exact = influence(q, k, v, *rows, call.scale)
        for name in ("sink", "moa", "set"):
            torch.testing.assert_close(getattr(found[layer], name), getattr(exact, name), rtol=1e-3, atol=1e-4)


def test_an_answer_is_all_that_counts() -> None:
    """In the last layer, rows after the answer have no gradient; in all layers, tokens after it have no influence."""
    model = llama()
    found = influence_of_prompt(model, TOKENS, ANSWER)[0]
    grads: list[torch.Tensor] = []

    def watch(call: Any, dense: Any) -> torch.Tensor:
        out = dense()
        if call.layer == 2:
            out.register_hook(grads.append)
        return out

    with attention_by(model, watch):
        answer_loss(model, TOKENS, ANSWER).backward()
    rows = grads[0][0].abs().amax((1, 2)) > 0
    assert rows.nonzero().flatten().tolist() == list(range(len(TOKENS) - 1, len(TOKENS) + len(ANSWER) - 1))
    assert all(isinstance(one, Influence) and one.moa.shape == (2, 3) for one in found.values())


def test_first_order_is_what_a_small_change_of_the_mask_does() -> None:
    """If one head of one layer loses one far key, the loss changes by about E: the model is nearly linear there."""
    model = llama(2)
    torch.nn.init.normal_(model.model.layers[1].self_attn.o_proj.weight, std=1e-4)  # a change too small to bend

    def drop(call: Any, dense: Any) -> torch.Tensor:
        if call.layer != 1:
            return dense()
        q, k, v = (x[0] for x in (call.q, call.k, call.v))
        kept = torch.ones(len(q), q.shape[1], q.shape[1], dtype=torch.bool)
        kept[:2, -1, 64 : q.shape[1] - 64] = False  # the last query of KV head 0, a window of one block
        k, v = (x.repeat_interleave(2, 0) for x in (k, v))
        hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1) | ~kept
        out = (q @ k.transpose(-1, -2) * call.scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v
        return out.transpose(0, 1)[None]

    with attention_by(model, drop), torch.no_grad():
        changed = answer_loss(model, TOKENS, ANSWER[:1])
    with torch.no_grad():
        plain = answer_loss(model, TOKENS, ANSWER[:1])
    one = influence_of_prompt(model, TOKENS, ANSWER[:1])[0][1].set[0, 1]
    assert 0 < abs(changed - plain).item() <= one.item() * 1.2


def test_what_cannot_be_profiled() -> None:
    with pytest.raises(TaskError, match="--model: its logits are capped"):
        influence_of_prompt(FAMILIES["gemma2"](), TOKENS, ANSWER)
    sliding, _ = influence_of_prompt(FAMILIES["gemma3"](), TOKENS, ANSWER)
    assert sorted(sliding) == [2], "layers with a sliding window stay as they are"
