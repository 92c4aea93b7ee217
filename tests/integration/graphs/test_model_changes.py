"""Whatever changes between two steps: the next step is what it is without graphs, never a stale graph."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders.stepping import prompt, stepped
from families import llama
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from sparse_patch import growing_cache, patch_model, span_cache, sparsity_report, unpatch_model

pytestmark = pytest.mark.usefixtures("one_thread")
QUEST = {"decode": {"method": "quest", "budget": 48, "page_size": 8, "min_length": 0, "layers": "all"}}
NEW, AT = 18, 9


class Doubled(nn.Module):
    """A module whose output is twice that of another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.inner(*args, **kwargs)


def doubled(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def mlp(model: PreTrainedModel) -> Any:
    return model.model.layers[1].mlp


def set_to(owner: Callable[[PreTrainedModel], Any], name: str, value: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A change of one attribute."""
    return lambda model: setattr(owner(model), name, value(getattr(owner(model), name)))


def new_data(model: PreTrainedModel) -> None:
    mlp(model).up_proj.weight.data = -mlp(model).up_proj.weight.data.clone()


def other_class(model: PreTrainedModel) -> None:
    module = mlp(model)
    module.__class__ = type(
        "Negated", (type(module),), {"forward": lambda self, x: -type(module).mro()[1].forward(self, x)}
    )


def patched_anew(model: PreTrainedModel) -> None:
    patch_model(model, {"decode": {**QUEST["decode"], "budget": 16}}, replace=True)


def adapter(model: PreTrainedModel) -> None:
    """What PEFT does to a linear layer."""
    mlp(model).down_proj = Doubled(mlp(model).down_proj)


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "weights in place": lambda model: mlp(model).up_proj.weight.mul_(-1),
    "a parameter replaced": set_to(lambda m: mlp(m).up_proj, "weight", lambda w: nn.Parameter(-w)),
    "the data of a parameter replaced": new_data,
    "a buffer replaced": set_to(lambda m: m.model.rotary_emb, "inv_freq", lambda x: 0.5 * x),
    "a module replaced": lambda model: setattr(model.model.layers[1], "mlp", Doubled(mlp(model))),
    "an adapter": adapter,
    "layers removed": set_to(lambda m: m.config, "num_hidden_layers", lambda n: n - 1),
    "a number on a module": set_to(lambda m: m.model.layers[1].self_attn, "scaling", lambda s: 2 * s),
    "a function on a module": set_to(mlp, "act_fn", lambda f: nn.Tanh().eval()),
    "forward of an object": set_to(mlp, "forward", lambda f: lambda x: -f(x)),
    "class of an object": other_class,
    "a forward hook": lambda model: mlp(model).register_forward_hook(doubled),
    "a forward pre-hook": lambda model: mlp(model).register_forward_pre_hook(lambda module, args: (-args[0],)),
    "a hook on the model": lambda model: model.model.register_forward_pre_hook(lambda module, args: None),
    "training": lambda model: model.train(),
    "another configuration": patched_anew,
    "unpatched": unpatch_model,
    "attention implementation": lambda model: model.set_attn_implementation("eager"),
    "an entry of the config": lambda model: model.config.rope_parameters.update(anything=1),
}
NO_EFFECT = {"a hook on the model", "training", "an entry of the config"}
STILL_SERVES = {"weights in place"}
EAGER = {"a forward hook", "a forward pre-hook", "a hook on the model", "training", "attention implementation"}
CAPTURED_AGAIN = {*CHANGES} - EAGER - STILL_SERVES


def run(decode_graph: str, change: Callable[[PreTrainedModel], Any]) -> tuple[torch.Tensor, PreTrainedModel]:
    model = patch_model(llama(), QUEST, decode_graph=decode_graph)
    return stepped(model, prompt(100), NEW, at=AT, change=change), model


@pytest.mark.parametrize("name", CHANGES)
def test_the_step_after_a_change(name: str) -> None:
    expected, _ = run("off", CHANGES[name])
    found, model = run("auto", CHANGES[name])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    unchanged, _ = run("off", lambda model: None)
    assert torch.equal(found[:, :AT], unchanged[:, :AT])
    assert torch.allclose(found[:, AT], unchanged[:, AT], atol=1e-3) == (name in NO_EFFECT)
    if name != "unpatched":
        captures = sparsity_report(model).graphs.captures
        assert captures == (1 if name == "another configuration" else 1 + (name in CAPTURED_AGAIN)), (
            "stale or thrown away"
        )


@pytest.mark.parametrize("decode_graph", ["off", "auto"])
def test_a_cache_does_not_serve_another_dtype(decode_graph: str) -> None:
    with pytest.raises(RuntimeError, match="same dtype"):
        run(decode_graph, lambda model: model.to(torch.bfloat16))


def test_a_class_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(mlp(llama()))
    before = kind.forward

    def change(model: PreTrainedModel) -> None:
        monkeypatch.setattr(kind, "forward", lambda self, x: -before(self, x))

    expected, _ = run("off", change)
    monkeypatch.setattr(kind, "forward", before)
    found, _ = run("auto", change)
    assert torch.equal(found, expected)


class Seeing(TorchDispatchMode):
    """Counts operators."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Seeing.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("around", "why"),
    [
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast"),
        (torch.enable_grad, "gradients"),
        (Seeing, "every operator"),
    ],
    ids=["autocast", "gradients", "a mode"],
)
def test_a_step_inside_something_that_graphs_cannot_serve(around: Callable[[], Any], why: str) -> None:
    model = patch_model(llama(), QUEST, on_unsupported="silent")
    cache = span_cache(model, 130)
    stepped(model, prompt(100), AT, cache)
    with torch.no_grad(), around():
        for token in prompt(5)[0]:
            model(input_ids=token.view(1, 1), past_key_values=cache)
    stepped(model, prompt(1), 2, cache)
    graphs = sparsity_report(model).graphs
    assert graphs.replays in (AT - 2 + 1, AT - 2 + 2), "keys that record gradients are copied to another place"
    (reason,) = graphs.eager
    assert why in reason and graphs.eager[reason] == 5


def test_settings_of_pytorch_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    model = patch_model(llama(), QUEST)
    try:
        stepped(model, prompt(100), NEW, at=AT, change=lambda model: torch.set_float32_matmul_precision("medium"))
    finally:
        torch.set_float32_matmul_precision(before)
    assert sparsity_report(model).graphs.captures == 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"return_dict": False}, "return_dict"),
        ({"labels": torch.ones(1, 1, dtype=torch.int64)}, "labels"),
    ],
)
def test_arguments_that_a_step_cannot_serve(arguments: dict[str, Any], why: str) -> None:
    model = patch_model(llama(), QUEST, on_unsupported="silent")
    cache_ids = prompt(100)
    with torch.no_grad():
        cache = growing_cache(model.config)
        model(input_ids=cache_ids, past_key_values=cache)
        for _ in range(4):
            model(input_ids=cache_ids[:, :1], past_key_values=cache, **arguments)
    assert [why in reason for reason in sparsity_report(model).graphs.eager] == [True]
    assert sparsity_report(model).graphs.replays == 0


def test_a_mask_that_changes() -> None:
    """A step compares its mask with that of the step before, wherever it differs."""

    def logits(decode_graph: str) -> torch.Tensor:
        model = patch_model(llama(), QUEST, decode_graph=decode_graph, on_unsupported="silent")
        cache, ids, seen = span_cache(model, 130), prompt(100, rows=2), []
        mask = torch.ones(2, 100, dtype=torch.int64)
        mask[1, :30] = 0
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, past_key_values=cache)
            for step in range(16):
                mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
                if step == 8:
                    mask[1, :40] = 0
                if step == 12:
                    mask[0, 50] = 0
                seen.append(model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache).logits)
        return torch.stack(seen)

    torch.testing.assert_close(logits("auto"), logits("off"), rtol=1e-4, atol=1e-4)


def test_a_copied_model_has_no_graphs() -> None:
    _, model = run("auto", lambda model: None)
    other = copy.deepcopy(model)
    assert sparsity_report(other).layers == sparsity_report(model).layers
    expected, _ = run("off", lambda model: None)
    assert torch.equal(stepped(other, prompt(100), NEW), expected)
