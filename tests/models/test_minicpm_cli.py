"""MiniCPM named by `--model`, with code beside the weights that must not run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders.minicpm_checkpoint import CONFIG, logits, longrope, random_weights, tokens, write
from safetensors.torch import load_file
from tiny_tokenizers import byte_fallback_bpe
from transformers import GraniteForCausalLM

from sparse_patch import load_config, load_minicpm
from sparse_patch.cli.inspection import inspect
from sparse_patch.models.loading import load_model


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
