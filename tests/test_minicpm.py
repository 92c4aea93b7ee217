"""MiniCPM checkpoints, written here in MiniCPM's own format, against a forward pass written by hand."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from oracles import minicpm as oracle
from safetensors.torch import load_file, save_file
from tiny_tokenizers import byte_fallback_bpe
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, GraniteForCausalLM, PreTrainedConfig, PreTrainedModel

from sparse_patch import (
    PatchError,
    SparsePatchError,
    load_config,
    load_minicpm,
    minicpm,
    patch_model,
    patched,
    sparsity_report,
)
from sparse_patch.evaluation.generation import load_model
from sparse_patch.inspection import inspect

VOCAB = 96
ORIGINAL = 32  # the length beyond which LongRoPE takes its long factors
EXACT = {"atol": 1e-5, "rtol": 0.0}  # of logits of size 1, in float32

CONFIG: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"],
    "model_type": "minicpm",
    "auto_map": {
        "AutoConfig": "configuration_minicpm.MiniCPMConfig",
        "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
    },
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 16,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "bfloat16",
}


def longrope(dim: int = 16, **changes: Any) -> dict[str, Any]:
    short, long = ([1 + step * i for i in range(dim // 2)] for step in (0.1, 0.7))
    factors = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": ORIGINAL}
    return {"rope_type": "longrope", **factors, **changes}


def random_weights(config: dict[str, Any]) -> oracle.Weights:
    """Large enough that a wrong position or a lost constant moves the logits; norms and biases are no identities."""
    generator = torch.Generator().manual_seed(5)
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * dim, (config["num_key_value_heads"] or config["num_attention_heads"]) * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (VOCAB, hidden)
    for layer in range(layers):
        block = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        named = {f"self_attn.{name}.weight": shape for name, shape in block.items()}
        if config.get("attention_bias"):
            named |= {f"self_attn.{name}.bias": shape[:1] for name, shape in block.items()}
        named |= {f"mlp.{name}.weight": shape for name, shape in mlp.items()}
        named |= {f"{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in named.items()}
    weights = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
    return {name: weight + 1 if "norm" in name else weight for name, weight in weights.items()}


def write(
    folder: Path, weights: oracle.Weights | None = None, file: str = "model.safetensors", **changes: Any
) -> tuple[dict[str, Any], oracle.Weights]:
    """A checkpoint; its config without the fields that are changed to `...`, and its weights."""
    config = {name: value for name, value in {**CONFIG, **changes}.items() if value is not ...}
    weights = random_weights({**CONFIG, **config}) if weights is None else weights
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save: Callable[[Any, Path], Any] = save_file if file.endswith("safetensors") else torch.save
    save(weights, folder / file)
    return config, weights


def write_in_parts(folder: Path, file: str) -> tuple[dict[str, Any], oracle.Weights]:
    config, weights = write(folder, file=file)
    (folder / file).unlink()
    pattern = file.replace(".", "{suffix}.")
    parts = split_torch_state_dict_into_shards(weights, filename_pattern=pattern, max_shard_size=60_000)
    assert len(parts.filename_to_tensors) > 3
    for name, tensors in parts.filename_to_tensors.items():
        part = {tensor: weights[tensor] for tensor in tensors}
        save_file(part, folder / name) if name.endswith("safetensors") else torch.save(part, folder / name)
    index = {"metadata": parts.metadata, "weight_map": parts.tensor_to_filename}
    (folder / f"{file}.index.json").write_text(json.dumps(index))
    return config, weights


def tokens(length: int, seed: int = 7) -> torch.Tensor:
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return model(ids if ids.dim() == 2 else ids[None], **inputs).logits


def assert_is_the_reference(model: nn.Module, config: dict[str, Any], weights: oracle.Weights) -> None:
    for length in (5, ORIGINAL, ORIGINAL + 1, 90):
        want = oracle.logits_of(config, weights, tokens(length))
        assert want.std() > 0.3
        torch.testing.assert_close(logits(model, tokens(length))[0], want, **EXACT)


# --- the same numbers ------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "longrope": {"rope_scaling": longrope()},
    "longrope-one-length": {"rope_scaling": longrope(), "max_position_embeddings": ORIGINAL},  # as published: no mscale
    "longrope-shorter": {"rope_scaling": longrope(), "max_position_embeddings": 24},
    "longrope-by-type": {"rope_scaling": {("type" if key == "rope_type" else key): v for key, v in longrope().items()}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2}},
    "theta": {"rope_theta": 1e6, "rope_scaling": None},
    "one-kv-head": {"num_key_value_heads": 1},
    "all-kv-heads": {"num_key_value_heads": 4},
    "kv-heads-not-said": {"num_key_value_heads": None},
    "tied": {"tie_word_embeddings": True, "rope_scaling": longrope()},
    "head_dim": {"head_dim": 32, "rope_scaling": longrope(32)},
    "bias": {"attention_bias": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_minicpm(tmp_path: Path, variant: str) -> None:
    config, weights = write(tmp_path, **VARIANTS[variant])
    model = load_minicpm(tmp_path, dtype=torch.float32)
    assert type(model) is GraniteForCausalLM and not model.training
    assert_is_the_reference(model, config, weights)


def test_every_constant_matters(tmp_path: Path) -> None:
    """Guards the test above: its checkpoints show a constant that is lost."""
    config, weights = write(tmp_path, rope_scaling=longrope())
    want = oracle.logits_of(config, weights, tokens(60))
    for change in ({"scale_emb": 11}, {"scale_depth": 1.3}, {"dim_model_base": 17}, {"max_position_embeddings": 70}):
        assert (oracle.logits_of({**config, **change}, weights, tokens(60)) - want).abs().max() > 1e-2
    for factors in ("short_factor", "long_factor"):
        changed = {**config, "rope_scaling": longrope(**{factors: [1.3] * 8})}
        moved = [
            (oracle.logits_of(changed, weights, tokens(n)) - oracle.logits_of(config, weights, tokens(n))).abs().max()
            for n in (ORIGINAL, ORIGINAL + 1)
        ]
        assert (moved[0] > 1e-2) == (factors == "short_factor") and (moved[1] > 1e-2) == (factors == "long_factor")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_parts(tmp_path: Path, file: str) -> None:
    config, weights = write_in_parts(tmp_path, file)
    assert_is_the_reference(load_minicpm(tmp_path, dtype=torch.float32), config, weights)


def test_pickled_weights_with_a_table_of_frequencies(tmp_path: Path) -> None:
    config, weights = write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write(tmp_path, {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, "pytorch_model.bin")
    assert_is_the_reference(load_minicpm(str(tmp_path), dtype="float32"), config, weights)


def test_rope_parameters_as_transformers_5_saves_them(tmp_path: Path) -> None:
    rope = {"rope_theta": 5e5, **longrope()}
    _, weights = write(tmp_path, rope_parameters=rope)
    model = load_minicpm(tmp_path, dtype=torch.float32)
    assert_is_the_reference(model, {**CONFIG, "rope_theta": 5e5, "rope_scaling": longrope()}, weights)


@pytest.mark.parametrize("flag", [True, ...], ids=["true", "absent"])
def test_a_stored_copy_of_tied_embeddings_is_no_contradiction(tmp_path: Path, flag: Any) -> None:
    config, weights = write(tmp_path, tie_word_embeddings=True)
    copied = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    write(tmp_path, copied, tie_word_embeddings=flag)
    assert_is_the_reference(load_minicpm(tmp_path, dtype=torch.float32), config, weights)


def test_without_a_word_on_tying_the_weights_decide(tmp_path: Path) -> None:
    _, weights = write(tmp_path, tie_word_embeddings=True)
    config, _ = write(tmp_path, weights, tie_word_embeddings=...)
    model = load_minicpm(tmp_path, dtype=torch.float32)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    assert_is_the_reference(model, config, weights)


@pytest.mark.parametrize("pieces", [[20, 1, 1, 1], [28, *[1] * 8], [20, 20, 1, 1], [40, 1, 9]], ids=str)
def test_decode_with_a_cache_rotates_each_call_by_its_own_length(tmp_path: Path, pieces: list[int]) -> None:
    """Also across the length: keys that are cached keep their factors, in Transformers as in the oracle."""
    config, weights = write(tmp_path, rope_scaling=longrope())
    model, held = load_minicpm(tmp_path, dtype=torch.float32), []
    cache = DynamicCache(config=model.config)
    for ids in tokens(sum(pieces)).split(pieces):
        want = oracle.logits_of(config, weights, ids, held)
        torch.testing.assert_close(logits(model, ids, past_key_values=cache)[0], want, **EXACT)


@pytest.mark.parametrize("longest", [ORIGINAL - 2, ORIGINAL + 10], ids=["short", "long"])
def test_rows_of_a_padded_batch_choose_their_factors_together(tmp_path: Path, longest: int) -> None:
    config, weights = write(tmp_path, rope_scaling=longrope())
    model = load_minicpm(tmp_path, dtype=torch.float32)
    rows = [tokens(longest), tokens(11, seed=8)]
    ids, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, -len(row) :], mask[number, -len(row) :] = row, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = logits(model, ids, attention_mask=mask, position_ids=positions)
    for number, row in enumerate(rows):
        want = oracle.logits_of(config, weights, row, batch_length=longest)
        torch.testing.assert_close(got[number, -len(row) :], want, **EXACT)


# --- what is carried over --------------------------------------------------------------------------------------------


def test_the_config_says_what_was_carried_over(tmp_path: Path) -> None:
    sparse = {"kernel_size": 32, "topk": 64, "dense_len": 8192, "use_nope": False}
    write(tmp_path, sparse_config=sparse, rope_scaling=longrope())
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
    config = (model := load_minicpm(tmp_path)).config
    assert config.sparse_config == sparse
    assert config.minicpm == {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16, "rope_type": "longrope"}
    assert model.dtype == torch.bfloat16 and model.generation_config.temperature == 0.7
    assert config.eos_token_id == [2, 3] and config.bos_token_id == 1 and config.pad_token_id is None


@pytest.mark.parametrize("sparsely", [False, True], ids=["unpatched", "patched"])
def test_a_saved_model_is_a_native_one(tmp_path: Path, sparsely: bool) -> None:
    config, weights = write(tmp_path / "minicpm", rope_scaling=longrope(), sparse_config={"topk": 8})
    model = load_minicpm(tmp_path / "minicpm", dtype=torch.float32)
    if sparsely:
        patch_model(model, "flexprefill.yaml")
    model.save_pretrained(tmp_path / "native")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()
    assert type(again) is GraniteForCausalLM
    assert again.config.sparse_config == {"topk": 8} and again.config.minicpm == model.config.minicpm
    assert_is_the_reference(again, config, weights)


def test_patched_it_is_sparse_and_at_full_density_dense(tmp_path: Path) -> None:
    write(tmp_path, rope_scaling=longrope(), max_position_embeddings=512)
    model, ids = load_minicpm(tmp_path, dtype=torch.float32), tokens(300)
    dense = logits(model, ids)
    flex = {"method": "flexprefill", "block_size": 16, "tau": 0.0, "min_length": 0}
    quest = {"method": "quest", "budget": 128, "min_length": 0, "layers": "all"}
    with patched(model, {"prefill": {**flex, "gamma": 0.99999, "min_budget": 288}}):  # sparse kernels, every block
        torch.testing.assert_close(logits(model, ids), dense, **EXACT)
        report = sparsity_report(model)
        assert report.density("prefill") == 1 and report.layers[0].prefill.sparse_calls == 1
    with patched(model, {"prefill": {**flex, "gamma": 0.5, "min_budget": 16}, "decode": quest}):
        cache = DynamicCache(config=model.config)
        for piece in ids.split([297, 1, 1, 1]):
            assert logits(model, piece, past_key_values=cache).isfinite().all()
        report = sparsity_report(model)
        assert report.density("prefill") < 0.9 and report.layers[0].decode.sparse_calls == 3 and not report.fallbacks()
    assert torch.equal(logits(model, ids), dense)


def test_its_own_sparse_attention_has_the_checkpoints_settings(tmp_path: Path) -> None:
    fixed = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "use_nope": False}
    settings = {"topk": 4, "init_blocks": 2, "window_size": 64, "dense_len": 128}
    write(tmp_path, rope_scaling=longrope(), max_position_embeddings=512, sparse_config={**fixed, **settings})
    model, ids = load_minicpm(tmp_path, dtype=torch.float32), tokens(400)
    with patched(model, "infllmv2.yaml"):
        cache = DynamicCache(config=model.config)
        pieces = [logits(model, piece, past_key_values=cache) for piece in ids.split([397, 1, 1, 1])]
        report = sparsity_report(model)
        at_once = logits(model, ids)
    assert report.remarks == [
        "infllmv2: a token reads 5 blocks of 64 keys and chooses 1 of them; the first 128 tokens read everything"
    ]
    assert report.density("prefill") < 1 and report.layers[0].decode.sparse_calls == 3 and not report.fallbacks()
    assert 5 * 64 - 64 < report.attended("decode") <= 5 * 64
    torch.testing.assert_close(torch.cat(pieces, 1), at_once, **EXACT)


def test_a_hub_id_is_fetched_without_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, list[str]]] = []

    def snapshot_download(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(minicpm, "snapshot_download", snapshot_download)
    config, weights = write(tmp_path)
    assert_is_the_reference(load_minicpm("some/model", dtype=torch.float32, revision="r"), config, weights)
    assert asked == [("some/model", "r", ["*.json", "*.safetensors"])]
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    load_minicpm("some/model", revision="r")
    assert asked[2:] == [("some/model", "r", ["*.json", "*.bin"])]


# --- what is refused -------------------------------------------------------------------------------------------------

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
        assert "no such folder, and not to be had from the hub" in refusal(name)
    for wrong in (None, 3):
        with pytest.raises(SparsePatchError, match=f"load_minicpm: path: expected a folder or a hub id, got {wrong}"):
            load_minicpm(wrong)  # type: ignore[arg-type]


class Payload:
    """Runs code where it is unpickled."""

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


# --- models that remote code made ------------------------------------------------------------------------------------


def remote_model(native: GraniteForCausalLM, asks_interface: bool, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    """The same model as remote code of Transformers would have made it."""
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


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A whole checkpoint folder: weights, tokenizer, and code that must not run."""
    byte_fallback_bpe().save_pretrained(tmp_path)
    vocabulary = len(byte_fallback_bpe())
    rows = torch.randn(vocabulary, CONFIG["hidden_size"], generator=torch.Generator().manual_seed(6)) * 0.2
    tied = {"tie_word_embeddings": True, "vocab_size": vocabulary}
    weights = {**random_weights({**CONFIG, **tied}), "model.embed_tokens.weight": rows}
    write(tmp_path, weights, **tied, max_position_embeddings=512, rope_scaling=longrope())
    for name in ("configuration_minicpm", "modeling_minicpm"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('code of a checkpoint ran')\n")
    return tmp_path


def test_the_model_option_loads_minicpm(with_code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the checkpoint's code"))
    model, tokenizer = load_model(with_code)
    assert type(model) is GraniteForCausalLM and model.config.minicpm["scale_emb"] == 12
    assert tokenizer("hello you")["input_ids"] == byte_fallback_bpe()("hello you")["input_ids"]
    model.save_pretrained(with_code / "native")
    tokenizer.save_pretrained(with_code / "native")
    again, same_tokenizer = load_model(with_code / "native")
    assert torch.equal(logits(again, tokens(40)), logits(model, tokens(40)))
    assert same_tokenizer("hello you")["input_ids"] == tokenizer("hello you")["input_ids"]
    layers, _ = inspect(with_code, load_config("flexprefill.yaml"))
    assert [layer["kv_heads"] for layer in layers] == [2, 2, 2] and layers[0]["prefill"] == "flexprefill"


def test_the_command_line_runs_minicpm(with_code: Path) -> None:
    def run(*command: str) -> subprocess.CompletedProcess[str]:
        whole = [sys.executable, "-m", "sparse_patch.cli", *command, "--model", str(with_code)]
        return subprocess.run(whole, capture_output=True, text=True, timeout=300, input="y\n")

    task = "--tasks", "vt", "--lengths", "256", "--samples", "1", "--json", str(with_code / "r.json")
    result = run("eval", "--config", "flexprefill", *task)
    assert result.returncode == 0, result.stderr
    assert {row["config"] for row in json.loads((with_code / "r.json").read_text())["rows"]} == {"dense", "flexprefill"}
    config = json.loads((with_code / "config.json").read_text())
    (with_code / "config.json").write_text(json.dumps({**config, "num_experts": 8}))
    result = run("show", "flexprefill")
    assert result.returncode == 2 and "num_experts: 8" in result.stderr and result.stderr.count("\n") == 1


def test_the_names_of_the_weights_are_granites(tmp_path: Path) -> None:
    write(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_minicpm(tmp_path).state_dict())
