"""How the loss changes if a head does not read a key: the attention influence of MoA, from one backward pass.

Let A be the attention of a head, G the gradient of the loss with respect to A, and D_i = sum_n A_in G_in. If query i
loses key j and the rest of its row is renormalised, the loss changes to first order by

    E_ij = - A_ij (G_ij - D_i) / (1 - A_ij).

With O the head's output and dO its gradient, G = dO V^T and D_i = <dO_i, O_i>. So only q, k, v, O and dO of a layer are
needed, and E_ij = <dO_i, O_i without j - O_i> exactly. If a whole set of keys is lost, with s their mass and g their
sum of A G, the change is (s D_i - g) / (1 - s). This is their joint effect, which the sum of their E is not.

From this follow two measures of losing all keys at a distance of `BLOCK * n` tokens or more, except the first block of
keys. Both are sums over the queries and over the query heads of a KV head:

- "moa": the sum of |E_ij|, the measure of MoA's public code (in its paper a signed mean);
- "set": the sum over queries of the absolute change by the whole set.

Distances are counted in tokens, i - j, and not from block to block as in the public code. Windows are multiples of
`BLOCK` (see `HeadSchedules`), so schedules always drop a suffix of whole bins.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparse_patch.calibration.moa.hook import attention_by
from sparse_patch.call import AttentionCall
from sparse_patch.kernels.availability import prefers_triton

BLOCK = 64  # tokens of a bin and of the sink; windows are multiples of it
_SMALLEST_REST = 1e-6  # if less of a row is left, the rest is noise

# The loss of an answer: the cross-entropy of its tokens, or minus the logarithm of their odds against all other tokens.
# They differ if a model is sure. Then the gradient of the cross-entropy vanishes, so the prompts that the model finds
# hard outweigh all others. The gradient of the log-odds does not vanish.
Objective = Literal["log-odds", "cross-entropy"]


@dataclass(frozen=True)
class Influence:
    """The influence of the KV heads of one layer or of several: sums of absolute changes of the loss.

    Attributes:
        sink: influence of the first block of keys, `[..., Hkv]`.
        moa: influence of the keys outside a window, by measure "moa", `[..., Hkv, NB]`. Entry n stands for a window of
            `BLOCK * n` tokens; a window of NB blocks or more loses nothing.
        set: the same by measure "set".
    """

    sink: torch.Tensor
    moa: torch.Tensor
    set: torch.Tensor


def influence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, grad: torch.Tensor, scale: float
) -> Influence:
    """The influence in one causal attention call of one row, a block of queries at a time, without N x N matrices.

    Args:
        q: `[Hq, N, D]`.
        k: `[Hkv, N, D]`.
        v: `[Hkv, N, Dv]`.
        out: `[Hq, N, Dv]`.
        grad: gradient of the loss with respect to `out`; 0 for padding, which then does not count.
        scale: factor on the logits.

    Returns:
        The influence in float64, computed in float32 or more; on a GPU by a Triton kernel.
    """
    if prefers_triton(q):
        from sparse_patch.calibration.moa.influence_triton import partial_influence

        sums = partial_influence(q, k, v, out, grad, scale, BLOCK, _SMALLEST_REST)
        return Influence(*(x.unflatten(0, (len(k), -1)).sum(1) for x in sums))
    return influence_in_torch(q, k, v, out, grad, scale)


def influence_in_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, grad: torch.Tensor, scale: float
) -> Influence:
    """See `influence`."""
    kind = torch.promote_types(q.dtype, torch.float32)
    kv_heads, length, _ = k.shape
    blocks = -(-length // BLOCK)
    q, k, v, out, grad = (nn.functional.pad(x, (0, 0, 0, blocks * BLOCK - length)) for x in (q, k, v, out, grad))
    q, out, grad = (x.unflatten(0, (kv_heads, -1)) for x in (q, out, grad))  # [Hkv, G, N, D]
    k, v = (x.to(kind).transpose(-1, -2) for x in (k, v))  # [Hkv, D, N]
    sink = torch.zeros(kv_heads, dtype=torch.float64, device=q.device)
    alone, together = (sink.new_zeros(kv_heads, blocks) for _ in range(2))
    for block in range(blocks):
        rows, keys = slice(block * BLOCK, (block + 1) * BLOCK), slice((block + 1) * BLOCK)
        q_rows, out_rows, grad_rows = (x[:, :, rows].to(kind) for x in (q, out, grad))
        attention = _attention(q_rows * scale, k[..., keys])
        mean = (grad_rows * out_rows).sum(-1, keepdim=True)
        weighted = _by_keys(grad_rows, v[..., keys]).mul_(attention)
        change = (attention * mean).sub_(weighted).div_((1 - attention).clamp_(min=_SMALLEST_REST))
        if block == 0:
            change[:, :, 0] = 0  # the first query has only one key, and nothing to read instead
        size = change.abs_().sum(1)
        sink += size[..., :BLOCK].sum((1, 2))
        alone[:, :block] += _beyond(size).sum(1).flip(-1)
        mass, sums = _beyond(attention), _beyond(weighted)
        change = (mass * mean - sums) / (1 - mass).clamp(min=_SMALLEST_REST)
        together[:, :block] += change.abs_().sum((1, 2)).flip(-1)
    return Influence(sink, alone, together)


def _attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The attention `[Hkv, G, R, K]` of R scaled queries at the last R of K positions; `k` is `[Hkv, D, K]`."""
    logits = _by_keys(q, k)
    own = logits[..., -q.shape[-2] :]
    own.masked_fill_(torch.ones(own.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return logits.softmax(-1)


def _by_keys(x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Products `[Hkv, G, R, K]` of `[Hkv, G, R, D]` and `[Hkv, D, K]`; the keys are not repeated over the group."""
    return torch.bmm(x.flatten(1, 2), keys).unflatten(1, x.shape[1:3])


def _beyond(x: torch.Tensor) -> torch.Tensor:
    """Sums over far keys, `[..., R, blocks before]`, of `[..., R, K]` (the last block of queries and all keys).

    With b the block of the queries, entry b - n sums over the keys that are at least n blocks of tokens away and not in
    the first block, which is set to 0. Each row is read one step further than the row before, which lines up the
    distances in columns. Past the end of a row, this reads the future of the row before, which is 0.
    """
    x[..., :BLOCK] = 0
    *heads, rows, keys = x.shape
    padded = nn.functional.pad(x.flatten(-2), (BLOCK, 0)).flatten(0, -2)
    strides = (padded.shape[-1], keys + 1, BLOCK, 1)
    bins = padded.as_strided((len(padded), rows, keys // BLOCK, BLOCK), strides, 1)
    return bins[:, :, 1:].sum(-1).cumsum(-1).unflatten(0, heads)


def influence_of_prompt(
    model: PreTrainedModel, tokens: Sequence[int], answer: Sequence[int], objective: Objective = "cross-entropy"
) -> tuple[dict[int, Influence], float]:
    """Layer -> the influence on the loss of an answer, and the loss itself.

    Meanwhile the weights are frozen, and each layer is computed again in the backward pass, so that only one layer's
    activations are held at a time.

    Args:
        model: an unpatched model in evaluation mode; it is left as it was.
        tokens: tokens of the prompt.
        answer: tokens of the answer.
        objective: see `Objective`.

    Raises:
        PatchError: the model is already patched, or cannot be patched.
        TaskError: the model caps its logits.
    """
    found: dict[int, Influence] = {}

    def see(call: AttentionCall, out: torch.Tensor, grad: torch.Tensor) -> None:
        found[call.layer] = _measure(call, out, grad)

    def attend(call: AttentionCall, _: Callable[[], torch.Tensor]) -> torch.Tensor:
        out = dense_attention(call).transpose(1, 2)
        return _Tap.apply(out, call.q, call.k, call.v, call, see)

    with attention_by(model, attend) as attention, _frozen(model), _checkpointed(model, attention), torch.enable_grad():
        loss = answer_loss(model, tokens, answer, objective)
        loss.backward()
    return found, float(loss.detach())


def answer_loss(
    model: PreTrainedModel, tokens: Sequence[int], answer: Sequence[int], objective: Objective = "cross-entropy"
) -> torch.Tensor:
    """The mean loss of an answer's tokens after a prompt, float32 `[]`, from one forward without a cache."""
    ids = torch.tensor([[*tokens, *answer[:-1]]], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer)).logits[0].float()
    right = torch.tensor(answer, device=logits.device)[:, None]
    others = logits if objective == "cross-entropy" else logits.scatter(1, right, -torch.inf)
    return (others.logsumexp(-1) - logits.gather(1, right)[:, 0]).mean()


def dense_attention(call: AttentionCall) -> torch.Tensor:
    """Dense attention, `[B, Hq, Sq, Dv]`, without the mask that Transformers makes for gradients: twice as fast."""
    k, v = (x.repeat_interleave(call.group_size, 1) for x in (call.k, call.v))
    return nn.functional.scaled_dot_product_attention(call.q, k, v, is_causal=True, scale=call.scale)


def _measure(call: AttentionCall, out: torch.Tensor, grad: torch.Tensor) -> Influence:
    out, grad = (x[0].transpose(0, 1) for x in (out, grad))
    return influence(call.q[0], call.k[0], call.v[0], out, grad, call.scale)


class _Tap(torch.autograd.Function):
    """Pass an output through; in the backward pass, show it together with its gradient.

    The shown tensors are saved for backward and not held by a closure, so a checkpoint drops and recomputes them.
    """

    @staticmethod
    def forward(
        ctx: Any, out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Any, see: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(out, q, k, v)
        ctx.see, ctx.scale, ctx.layer = see, call.scale, call.layer
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        out, q, k, v = ctx.saved_tensors
        ctx.see(AttentionCall(q, k, v, ctx.scale, ctx.layer, "prefill"), out, grad)
        return grad, None, None, None, None, None


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """For a `with` block: only the embeddings' output needs gradients, not the weights, so layers pass gradients on."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
    model.requires_grad_(False)
    try:
        yield
    finally:
        hook.remove()
        for weight in weights:
            weight.requires_grad_(True)


@contextmanager
def _checkpointed(model: PreTrainedModel, attention: Sequence[nn.Module]) -> Iterator[None]:
    """For a `with` block: recompute the layers around attention modules in the backward pass, as in training."""
    inside = {id(module) for module in attention}
    layers = [module for module in model.modules() if any(id(child) in inside for child in module.children())]
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        vars(layer)["forward"] = _again(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del vars(layer)["forward"]
            if forward is not None:
                vars(layer)["forward"] = forward


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return checkpointed
