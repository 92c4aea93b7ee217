"""What it changes that a head does not read a key: the attention influence of MoA, from one backward pass.

With the attention A of a head, the gradient G of the loss by A, and D_i = sum_n A_in G_in: if query i loses key j and
the rest of its row is renormalised, the loss changes to first order by

    E_ij = - A_ij (G_ij - D_i) / (1 - A_ij).

G = dO V^T and D_i = <dO_i, O_i>, with O the head's output and dO its gradient, so that nothing but q, k, v, O and dO
of a layer is needed, and E_ij = <dO_i, O_i without j - O_i> exactly. Of a set of keys that are all lost, with s their
mass and g their sum of A G, the change is (s D_i - g) / (1 - s): what they do together, which the sum of their E is
not.

Two measures of losing all that is at `BLOCK * n` tokens or more, the first block of keys excepted, come of it, as sums
over the queries and the query heads of a KV head:

- "moa": sum of |E_ij|, the measure of MoA's public code, in its paper a signed mean;
- "set": sum over queries of the absolute change by the whole set.

Distances are counted in tokens, i - j, not from block to block as in the public code: windows are multiples of `BLOCK`
(see `HeadSchedules`), so that what schedules drop is a suffix of the bins, without a boundary that is half in.
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

BLOCK = 64  # tokens of a bin, of the sink, and what windows are multiples of
_SMALLEST_REST = 1e-6  # below it the rest of a row is noise

# What an answer loses: the cross-entropy of its tokens, or minus the logarithm of their odds against all other tokens.
# They differ where a model is sure: the gradient of the cross-entropy vanishes there, so that the prompts that it finds
# hard outweigh all others; that of the log-odds does not.
Objective = Literal["log-odds", "cross-entropy"]


@dataclass(frozen=True)
class Influence:
    """Of the KV heads of a layer, or of several; sums of absolute changes of the loss.

    Attributes:
        sink: what lies on the first block of keys, `[..., Hkv]`.
        moa: entry n: what is lost with a window of `BLOCK * n` tokens, `[..., Hkv, NB]`; with NB or more nothing is.
        set: likewise.
    """

    sink: torch.Tensor
    moa: torch.Tensor
    set: torch.Tensor


def influence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, grad: torch.Tensor, scale: float
) -> Influence:
    """The influence of one causal attention call of one row, a block of queries at a time, never N x N.

    Args:
        q: `[Hq, N, D]`.
        k: `[Hkv, N, D]`.
        v: `[Hkv, N, Dv]`.
        out: `[Hq, N, Dv]`.
        grad: of the loss by `out`; zero for padding, which then counts for nothing.
        scale: factor on the logits.

    Returns:
        float64, computed in float32 or more; on a GPU by a Triton kernel.
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
            change[:, :, 0] = 0  # the first query has one key, and nothing to read in its place
        size = change.abs_().sum(1)
        sink += size[..., :BLOCK].sum((1, 2))
        alone[:, :block] += _beyond(size).sum(1).flip(-1)
        mass, sums = _beyond(attention), _beyond(weighted)
        change = (mass * mean - sums) / (1 - mass).clamp(min=_SMALLEST_REST)
        together[:, :block] += change.abs_().sum((1, 2)).flip(-1)
    return Influence(sink, alone, together)


def _attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The attention `[Hkv, G, R, K]` of R scaled queries, the last R of K positions; `k` is `[Hkv, D, K]`."""
    logits = _by_keys(q, k)
    own = logits[..., -q.shape[-2] :]
    own.masked_fill_(torch.ones(own.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return logits.softmax(-1)


def _by_keys(x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Products `[Hkv, G, R, K]` of `[Hkv, G, R, D]` and `[Hkv, D, K]`, which is not repeated over the group."""
    return torch.bmm(x.flatten(1, 2), keys).unflatten(1, x.shape[1:3])


def _beyond(x: torch.Tensor) -> torch.Tensor:
    """What lies far off: of `[..., R, K]`, the last block of queries and all keys, sums `[..., R, blocks before]`.

    Entry b - n, with b the block of the queries, is over the keys that are n blocks of tokens away or more and not in
    the first block, which is set to 0. Reading each row one step further than the row before lines up the distances in
    columns; where that runs over a row's end it reads the future of the row before, which is 0.
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
    """The influence on what an answer loses, by layer, and the loss itself.

    The weights are frozen meanwhile and each layer is computed again in the backward pass, so that the activations of
    one layer are held at a time.

    Args:
        model: not patched, in evaluation mode; it is left so.
        tokens: of the prompt.
        answer: tokens after it.
        objective: see `Objective`.

    Raises:
        PatchError: the model is patched already, or cannot be.
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
    """What the tokens of an answer lose after a prompt, mean, float32 `[]`, from one forward without a cache."""
    ids = torch.tensor([[*tokens, *answer[:-1]]], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer)).logits[0].float()
    right = torch.tensor(answer, device=logits.device)[:, None]
    others = logits if objective == "cross-entropy" else logits.scatter(1, right, -torch.inf)
    return (others.logsumexp(-1) - logits.gather(1, right)[:, 0]).mean()


def dense_attention(call: AttentionCall) -> torch.Tensor:
    """`[B, Hq, Sq, Dv]`. Without a mask, which Transformers makes for gradients and which takes twice the time."""
    k, v = (x.repeat_interleave(call.group_size, 1) for x in (call.k, call.v))
    return nn.functional.scaled_dot_product_attention(call.q, k, v, is_causal=True, scale=call.scale)


def _measure(call: AttentionCall, out: torch.Tensor, grad: torch.Tensor) -> Influence:
    out, grad = (x[0].transpose(0, 1) for x in (out, grad))
    return influence(call.q[0], call.k[0], call.v[0], out, grad, call.scale)


class _Tap(torch.autograd.Function):
    """Passes an output on, and shows it with its gradient in the backward pass.

    What it shows is saved for backward, not held by a closure: a checkpoint drops it and computes it again.
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
    """No gradients for weights, but for what the embeddings give, so that the layers have some to pass on."""
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
    """Compute the layers around attention modules again in the backward pass, as Transformers does in training."""
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
