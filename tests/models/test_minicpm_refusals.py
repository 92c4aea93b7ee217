"""MiniCPM checkpoints that are refused, and models made by remote code."""

from __future__ import annotations

import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.minicpm_checkpoint import CONFIG, logits, longrope, random_weights, tokens, write, write_in_parts
from transformers import GraniteForCausalLM, PreTrainedConfig, PreTrainedModel

from sparse_patch import PatchError, SparsePatchError, load_minicpm, patch_model, patched, sparsity_report
from sparse_patch.models import minicpm

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "minicpm3": (
        {"model_type": "minicpm3"},
        "model_type: expected 'minicpm', got 'minicpm3'; load .* AutoModelForCausal",
    ),
    "no-type": ({"model_type": ...}, "model_type: expected 'minicpm', got None"),
    "other-head": (
        {"architectures": ["MiniCPMForSequenceClassification"]},
        "architectures: expected MiniCPMForCausalLM",
    ),
    "experts": ({"num_experts": 8}, "num_experts: 8: a mixture of experts; only dense MiniCPM"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config: .* take the unquantized checkpoint"),
    "activation": ({"hidden_act": "fatrelu"}, "hidden_act: 'fatrelu' is not known"),
    "missing": ({"scale_depth": ...}, "scale_depth: missing; copy it from the published checkpoint"),
    "text": ({"scale_emb": "12"}, "scale_emb: expected a valid number, got '12'"),
    "zero": ({"dim_model_base": 0}, "dim_model_base: expected greater than 0, got 0"),
    "layers": ({"num_hidden_layers": 2.5}, "num_hidden_layers: expected a valid integer, got 2.5"),
    "kv-heads": ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of num_attention_heads 4, got 3"),
    "heads": ({"num_attention_heads": 5}, "hidden_size: 64 is no multiple of 5 heads; set head_dim"),
    "odd": ({"head_dim": 17}, "head_dim: expected an even number, got 17"),
    "padding": ({"pad_token_id": 96}, "pad_token_id: expected less than vocab_size 96, got 96"),
    "dtype": ({"torch_dtype": "int8"}, "dtype: expected 'float32', 'float16' or 'bfloat16', got 'int8'"),
    "rope": (
        {"rope_scaling": {"type": "yarn", "factor": 4}},
        "rope_scaling: expected a rope_type of default, .*got 'yarn'",
    ),
    "rope-list": ({"rope_scaling": [1]}, r"rope_scaling: expected .*got \[1\]"),
    "rope-factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: missing"),
    "rope-field": ({"rope_scaling": longrope(mscale=2)}, "rope_scaling.mscale: MiniCPM's RoPE has no such field"),
    "rope-count": (
        {"rope_scaling": longrope(18)},
        r"rope_scaling.short_factor: expected 8 numbers \(head_dim / 2\), got 9",
    ),
    "rope-number": (
        {"rope_scaling": longrope(long_factor=[0] * 8)},
        "rope_scaling.long_factor.0: expected greater than 0",
    ),
    "rope-original": (
        {"rope_scaling": longrope(original_max_position_embeddings=None)},
        "rope_scaling.original_max_position_embeddings: expected a valid integer, got None",
    ),
    "theta": ({"rope_theta": None}, "rope_scaling.rope_theta: expected a valid number, got None"),
    "shape": ({"intermediate_size": 100}, r"_proj.weight: expected the shape \[\d+, \d+\] by config.json, got \["),
    "fewer": ({"num_hidden_layers": 4}, r"9 of \d+ weights are missing, first model.layers.3.input_layernorm.weight"),
    "more": ({"num_hidden_layers": 2}, "model.layers.2.*: a dense MiniCPM by config.json has no such weight"),
    "bias": ({"attention_bias": True}, "12 of .* weights are missing, first .*bias"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings: true, but lm_head.weight is not .*set it to false"),
}


def refusal(path: str | Path) -> str:
    with pytest.raises(SparsePatchError) as error:
        load_minicpm(path)
    message = str(error.value)
    assert "\n" not in message and message.startswith(str(path))
    return message


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_carried_over_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    changes, expected = REFUSED[case]
    write(tmp_path, random_weights(CONFIG), **changes)
    assert re.search(expected, message := refusal(tmp_path)), message


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    assert "has no config.json, or an empty one; name the folder" in refusal(tmp_path)
    write_in_parts(tmp_path, "model.safetensors")
    part = sorted(tmp_path.glob("*.safetensors"))[1]
    part.write_bytes(part.read_bytes()[:1000])
    assert f"{part.name}: cannot be read as weights" in refusal(tmp_path)
    part.unlink()
    assert f"there is no {part.name} beside it; download it again" in refusal(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    assert "index.json: expected a weight_map" in refusal(tmp_path)
    index.unlink()
    assert "no weights; expected model.safetensors or pytorch_model.bin" in refusal(tmp_path)
    for text in ("{", "3", "[]"):
        (tmp_path / "config.json").write_text(text)
        assert "config.json" in refusal(tmp_path) and not minicpm.is_minicpm(tmp_path)


def test_a_name_that_is_not_there() -> None:
    for name in ("no-such/model", "./no/such/folder"):
        assert "no such folder, and not available from the hub" in refusal(name)
    for wrong in (None, 3):
        with pytest.raises(SparsePatchError, match=f"load_minicpm: path: expected a folder or a hub id, got {wrong}"):
            load_minicpm(wrong)  # type: ignore[arg-type]


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise AssertionError('code of a checkpoint ran')",)


def test_pickles_run_no_code(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for content in ({"model.norm.weight": Payload()}, ["no", "weights"]):
        torch.save(content, tmp_path / "pytorch_model.bin")
        assert "pytorch_model.bin: cannot be read as weights" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(), protocol=2))
    assert "pytorch_model.bin: cannot be read as weights" in refusal(tmp_path)


def remote_model(native: GraniteForCausalLM, asks_interface: bool, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """The same model as Transformers' remote code would make it."""
    module = types.ModuleType("transformers_modules.minicpm.modeling_minicpm")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class MiniCPMConfig(PreTrainedConfig):
        model_type = "minicpm"

    body: dict[str, Any] = {"__module__": module.__name__}
    own = {} if asks_interface else {"forward": lambda self, hidden_states, **kwargs: (hidden_states, None)}
    attention = type("MiniCPMAttention", (type(native.model.layers[0].self_attn),), {**body, **own})
    native.__class__ = type("MiniCPMForCausalLM", (GraniteForCausalLM,), body)
    config = MiniCPMConfig(**{**native.config.to_dict(), "model_type": "minicpm"})
    config._attn_implementation = "sdpa"
    for part in native.modules():
        if hasattr(part, "config"):
            part.config = config
        if hasattr(part, "layer_idx"):
            part.__class__ = attention
    return native


def test_remote_code_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    model = remote_model(load_minicpm(tmp_path, dtype=torch.float32), False, monkeypatch)
    with pytest.raises(PatchError) as error:
        patch_model(model, "flexprefill.yaml")
    message = str(error.value)
    assert "transformers_modules.minicpm.modeling_minicpm.MiniCPMAttention" in message and "\n" not in message
    assert "3 of 3" in message and "load it with sparse_patch.load_minicpm, which needs no remote code" in message
    assert not hasattr(model, "sparse_patch")


def test_remote_code_that_asks_the_interface_is_patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    model = remote_model(load_minicpm(tmp_path, dtype=torch.float32), True, monkeypatch)
    before = logits(model, tokens(60))
    with patched(model, "dense.yaml"):
        assert torch.equal(logits(model, tokens(60)), before)
        assert [layer.prefill.calls for layer in sparsity_report(model).layers] == [1, 1, 1]
