"""MiniCPM checkpoints, written here in MiniCPM's own format, compared with a hand-written forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.minicpm_checkpoint import (
    CONFIG,
    EXACT,
    ORIGINAL,
    assert_is_the_reference,
    logits,
    longrope,
    tokens,
    write,
    write_in_parts,
)
from oracles import minicpm as oracle
from transformers import AutoModelForCausalLM, DynamicCache, GraniteForCausalLM

from sparse_patch import load_minicpm, patch_model, patched, sparsity_report
from sparse_patch.models.minicpm import loading

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
    """Guards the test above: with its checkpoints, a lost constant changes the result."""
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
    """This holds across the length too: cached keys keep their factors, in Transformers as in the oracle."""
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

    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)
    config, weights = write(tmp_path)
    assert_is_the_reference(load_minicpm("some/model", dtype=torch.float32, revision="r"), config, weights)
    assert asked == [("some/model", "r", ["*.json", "*.safetensors"])]
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    load_minicpm("some/model", revision="r")
    assert asked[2:] == [("some/model", "r", ["*.json", "*.bin"])]
