"""Calls of a model in every way that a dense configuration must leave as it is, and their comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from families import VOCAB
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparse_patch import sparsity_report
from sparse_patch.integration.names import is_hook

DENSE = {"prefill": {"method": "dense"}, "decode": {"method": "dense"}}
LENGTH = 48
PADDING = 20  # deep enough that three windows reach it from the last token
NEW_TOKENS = 6
Outputs = dict[str, torch.Tensor]
Scenario = Callable[[PreTrainedModel], Outputs]


def prompt(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Token ids `[rows, length]`, always the same, without the padding and the image tokens."""
    return torch.randint(1, VOCAB - 4, (rows, length), generator=torch.Generator().manual_seed(7))


def padded_prompt(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask `[2, LENGTH]`; the second row has PADDING padding tokens on `side`."""
    ids, mask = prompt(), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, slice(PADDING) if side == "left" else slice(LENGTH - PADDING, None)] = 0
    return ids * mask, mask


def assert_same(got: Outputs, want: Outputs, tolerance: float = 0.0) -> None:
    """Equal names and shapes; equal bits, or numbers that are at most `tolerance` apart."""
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.shape == want[name].shape, name
        if not torch.equal(tensor, want[name]):
            apart = (tensor - want[name]).abs().max().item()
            assert apart <= tolerance, f"{name}: {apart} apart"


def logits(model: nn.Module, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def implementations(model: nn.Module) -> dict[str, str]:
    """The attention implementation that each module's config names."""
    modules = [(name, getattr(module, "config", None)) for name, module in model.named_modules()]
    return {name: config._attn_implementation for name, config in modules if hasattr(config, "_attn_implementation")}


def text_attention(model: nn.Module) -> list[nn.Module]:
    """The decoder layers' attention modules, in order; none of a vision tower."""
    layers = [(name, module) for name, module in model.named_modules() if name.split(".")[-2:-1] == ["layers"]]
    return [layer.self_attn for name, layer in layers if "vision" not in name]


@contextmanager
def counted_calls() -> Iterator[Counter[nn.Module]]:
    """Count, per attention module, the calls that Transformers dispatches to the hook, under any of its names."""
    calls: Counter[nn.Module] = Counter()
    hooks = {name: ALL_ATTENTION_FUNCTIONS[name] for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if is_hook(name)}

    def spy(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls[module] += 1
        return hooks[module.config._attn_implementation](module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.update(dict.fromkeys(hooks, spy))
    try:
        yield calls
    finally:
        for name in hooks:
            del ALL_ATTENTION_FUNCTIONS[name]  # only the override; the registered function stays


def assert_reported(model: nn.Module, calls: Counter[nn.Module]) -> None:
    """The hook was reached by every attention module that the report lists, and the report counts the calls."""
    reported = {model.get_submodule(layer.name): layer for layer in sparsity_report(model).layers}
    assert list(reported) == text_attention(model)
    assert calls == {module: layer.prefill.calls + layer.decode.calls for module, layer in reported.items()}
    assert not any(layer.prefill.sparse_calls + layer.decode.sparse_calls for layer in reported.values())


def forward(model: PreTrainedModel) -> Outputs:
    return {"logits": logits(model, input_ids=prompt())}


def all_ones_mask(model: PreTrainedModel) -> Outputs:
    return {"logits": logits(model, input_ids=prompt(), attention_mask=torch.ones(2, LENGTH, dtype=torch.long))}


def padded_batch(model: PreTrainedModel, side: str) -> Outputs:
    """Padding positions are nobody's concern, but the same kernels see the same mask, so they agree as well."""
    ids, mask = padded_prompt(side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = logits(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    return {"valid positions": out[mask == 1], "padding positions": out[mask == 0]}


def generate(model: PreTrainedModel, side: str | None = None, **options: Any) -> Outputs:
    ids, mask = padded_prompt(side) if side else (prompt(), torch.ones(2, LENGTH, dtype=torch.long))
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True, **options}
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    outputs = {"logits": torch.stack(out.logits), "tokens": out.sequences}
    return outputs | ({"scores": torch.stack(out.scores)} if out.scores else {})


def by_hand(model: PreTrainedModel, static: bool, pieces: list[int]) -> Outputs:
    """Feed the prompt in `pieces` through one cache: from the second piece on, q_start is what was cached before."""
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 5) if static else DynamicCache(config=model.config)
    steps = prompt(length=sum(pieces)).split(pieces, dim=1)
    out = [logits(model, input_ids=ids, past_key_values=cache, use_cache=True) for ids in steps]
    return {f"step {i}": step for i, step in enumerate(out)}


def packed(model: PreTrainedModel) -> Outputs:
    """Two documents in one row, told apart by nothing but positions that begin again."""
    positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
    return {"logits": logits(model, input_ids=prompt(rows=1), position_ids=positions, use_cache=False)}


def gradient_checkpointing(model: PreTrainedModel) -> Outputs:
    """Training mode, the loss and the gradient of every parameter."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # its newer name
    getattr(model.train(), f"{kind}_checkpointing_enable")()
    model.zero_grad()
    loss = model(input_ids=prompt(), labels=prompt(), use_cache=False).loss
    loss.backward()
    getattr(model.eval(), f"{kind}_checkpointing_disable")()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert any("self_attn" in name for name in gradients)
    return {"loss": loss.detach(), **gradients}


def attention_weights(model: PreTrainedModel) -> Outputs:
    """What `output_attentions=True` gives: the weights if the implementation is eager, else none of them."""
    with torch.no_grad():
        out = model(input_ids=prompt(), output_attentions=True)
    weights = {f"layer {i}": layer for i, layer in enumerate(out.attentions)}
    assert len(weights) in (0, model.config.num_hidden_layers)
    return {"logits": out.logits, **weights}


def eager_attention_weights(model: PreTrainedModel) -> Outputs:
    outputs = attention_weights(model)
    assert "layer 0" in outputs
    return outputs


def mask_4d(model: PreTrainedModel) -> Outputs:
    """A float mask that nobody would guess: a prefix that sees itself both ways, and a stretch of keys taken away."""
    keep = torch.ones(LENGTH, LENGTH).tril().bool()
    keep[:10, :10] = True
    keep[25:, 12:20] = False
    mask = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(~keep, torch.finfo(torch.float32).min)
    return {"logits": logits(model, input_ids=prompt(), attention_mask=mask)}


SCENARIOS: dict[str, Scenario] = {
    "forward": forward,
    "all-ones-mask": all_ones_mask,
    "left-padded": partial(padded_batch, side="left"),
    "right-padded": partial(padded_batch, side="right"),
    "generate": generate,
    "generate-left-padded": partial(generate, side="left"),
    "generate-static": partial(generate, cache_implementation="static"),
    "generate-static-left-padded": partial(generate, side="left", cache_implementation="static"),
    "chunked-prefill": partial(generate, prefill_chunk_size=16),
    "chunked-prefill-left-padded": partial(generate, side="left", prefill_chunk_size=16),
    "continued-chat": partial(by_hand, static=False, pieces=[28, 20, 1, 1]),
    "continued-chat-static": partial(by_hand, static=True, pieces=[28, 20, 1, 1]),
    "decode-static": partial(by_hand, static=True, pieces=[40, *[1] * 8]),
    "beam-search": partial(generate, side="left", num_beams=3, output_scores=True),
    "packed": packed,
    "gradient-checkpointing": gradient_checkpointing,
    "attention-weights": attention_weights,
    "attention-weights-eager": eager_attention_weights,  # with attn_implementation="eager"
    "mask-4d": mask_4d,
}
# Gemma 4 lets only the last query of a prompt through its KV-shared layers, except under the implementation *named*
# sdpa where a mask is left out. The hook has another name and lazy masks, so there these layers compute one row of the
# same attention instead of all rows, with another kernel: rounding, of logits of size 1.
TOLERANCES = {("gemma4", "generate-static"): 1e-5}
