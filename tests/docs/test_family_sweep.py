"""docs/families.md shows what is measured, without a fault, and the sweep sees faults. A sample of it runs here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import causal_classes
from transformers import PreTrainedModel

from benchmarks.families.claims import what_is_untrue
from benchmarks.families.page import FAULTS, page, said, status_of, totals_of
from benchmarks.families.probe import RAW, WRONG, Probe
from benchmarks.families.settings import METHODS
from benchmarks.families.sweep import measure
from sparse_patch.ops.attention import page_decode
from sparse_patch.ops.attention.op import Attended

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


COMMITTED = json.loads((ROOT / "docs" / "families.json").read_text(encoding="utf-8"))
OF_EACH_KIND = ["flexprefill", "tidaldecode", "quest", "moa"]
SAMPLE = {
    "right": [
        "CTRLLMHeadModel",  # passes its cache on under another name, as GPT-NeoX and GPT-BigCode do
        "DiffLlamaForCausalLM",  # attends twice in a layer
        "DogeForCausalLM",  # computes on its mask
        "FalconH1ForCausalLM",  # has a recurrence beside its attention
        "GptOssForCausalLM",  # has sinks in the softmax
        "GPTBigCodeForCausalLM",  # has one KV head
        "GPTNeoXForCausalLM",
        "JetMoeForCausalLM",  # repeats its keys after caching them
        "Kosmos2TextForCausalLM",  # makes its own mask
        "LongcatFlashForCausalLM",  # has two attention layers in one decoder layer, not named attention
        "Qwen4ExpForCausalLM",  # computes on its mask, and mixes kinds of layers
    ],
    "refused": [
        "BigBirdPegasusForCausalLM",
        "BloomForCausalLM",
        "DeepseekV32ForCausalLM",
        "DeepseekV4ForCausalLM",
        "HrmTextForCausalLM",
        "MambaForCausalLM",
        "Zamba2ForCausalLM",
    ],
}


@pytest.mark.parametrize("status, name", [(status, name) for status, names in SAMPLE.items() for name in names])
def test_a_sample_is_as_the_table_says(status: str, name: str) -> None:
    if name not in causal_classes():
        pytest.skip(f"this Transformers has no {name}")
    methods = OF_EACH_KIND if status == "right" else ["dense", "moa"]
    found = measure(name, methods)
    assert status_of(found) == status, said(found)
    if transformers.__version__ == COMMITTED["versions"]["transformers"]:
        assert by_method(found, methods) == by_method(COMMITTED["families"][name], methods), "run make families"


def by_method(found: dict[str, Any], methods: list[str]) -> dict[str, str]:
    """The outcome of each method."""
    return {method: outcome for outcome, of in found["methods"].items() for method in of if method in methods}


def test_the_table_has_every_class_and_every_method_and_no_fault() -> None:
    families, totals = COMMITTED["families"], COMMITTED["totals"]
    assert totals == totals_of(families)
    assert {fault: totals[fault] for fault in FAULTS} == dict.fromkeys(FAULTS, 0)
    for found in families.values():
        methods = [method for of in found.get("methods", {}).values() for method in of]
        assert sorted(methods) == sorted(METHODS) or found["not shrunk"]
    if transformers.__version__ == COMMITTED["versions"]["transformers"]:
        assert set(families) == set(causal_classes()), "run make families"


def test_the_page_is_made_of_the_table() -> None:
    committed = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert committed == page(COMMITTED), "run make families"


# --- the sweep sees faults -------------------------------------------------------------------------------------------


def test_wrong_numbers_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = page_decode.OP.attend

    def a_little_off(*args: Any, **kwargs: Any) -> Attended:
        attended = attend(*args, **kwargs)
        return attended._replace(out=1.01 * attended.out)

    monkeypatch.setattr(page_decode.OP, "attend", a_little_off)
    found = measure("LlamaForCausalLM", ["quest", "flexprefill"])
    assert status_of(found) == WRONG
    assert [outcome.partition(":")[0] for outcome in found["methods"]] == ["WRONG", "sparse"]


def test_exceptions_that_are_not_ours_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_decode.OP, "attend", lambda *_, **__: torch.zeros(2) + torch.zeros(3))
    found = measure("LlamaForCausalLM", ["quest"])
    assert status_of(found) == RAW


@pytest.fixture
def llama() -> PreTrainedModel:
    model: PreTrainedModel = Probe("LlamaForCausalLM").model
    return model


@pytest.mark.parametrize(
    "message",
    [
        "X: has no attention: no module asks Transformers' attention interface",
        "X: 3 of 3 attention modules do not ask Transformers' attention interface, first a.b (c.LlamaAttention); so",
        "X: found no causal self-attention (Y is not); sparse_patch needs a decoder-only model",
        "X: found no causal self-attention: LlamaAttention says that it is not causal (is_causal is False)",
        "X: found no attention of its decoder: LlamaAttention has another config than LlamaConfig",
        "X cannot be patched: LlamaAttention computes by the name of its attention implementation",
        "X cannot be patched: LlamaAttention changes its mask only if that is a tensor",
        "X cannot be patched: LlamaAttention does not say which layer it is of (layer_idx is None)",
        "X cannot be patched: model.layers.0.self_attn and model.layers.1.self_attn are both of layer 0",
        "decode.roles.select: layer 1 has no full attention in this model and cannot select",
        "decode.roles.full: no layer of 3 is left to be sparse",
        "load the model without trust_remote_code",
        "a reason that nobody thought of",
    ],
)
def test_untrue_reasons_are_seen(llama: PreTrainedModel, message: str) -> None:
    assert what_is_untrue(message, llama) is not None
