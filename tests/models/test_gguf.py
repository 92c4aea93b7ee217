"""GGUF files: a model that is written and read again, its tokenizer, and files that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sparse_patch import SparsePatchError, patched, sparsity_report
from sparse_patch.models.loading import load_model, load_tokenizer, load_weights, model_name, native_config

gguf = pytest.importorskip("gguf")

TOKENS = [*bytes_to_unicode().values(), "12", "<|end|>"]
WEIGHTS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "output": "self_attn.o_proj",
}  # fmt: skip
MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), **sizes, **heads, tie_word_embeddings=False)).eval()


def rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """As llama.cpp stores queries and keys: the two halves of a head's channels in turn."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(path: Path, model: LlamaForCausalLM, pre: str = "smollm") -> Path:
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 1) + [3])
    writer.add_token_merges(["1 2"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id):
        add(len(TOKENS) - 1)

    def add_tensor(name: str, weight: torch.Tensor) -> None:
        writer.add_tensor(f"{name}.weight", weight.detach().contiguous().numpy())

    add_tensor("token_embd", model.model.embed_tokens.weight)
    add_tensor("output_norm", model.model.norm.weight)
    add_tensor("output", model.lm_head.weight)
    for number, layer in enumerate(model.model.layers):
        for name, module in WEIGHTS.items():
            weight = layer.get_submodule(module).weight
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name)
            add_tensor(f"blk.{number}.attn_{name}", rotated(weight, heads) if heads else weight)
        for name, module in MLP.items():
            add_tensor(f"blk.{number}.ffn_{name}", layer.mlp.get_submodule(module).weight)
        for name, module in NORMS.items():
            add_tensor(f"blk.{number}.{name}", layer.get_submodule(module).weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_and_its_folder_load_as_the_model_that_was_written(tmp_path: Path) -> None:
    model = llama()
    file = write(tmp_path / "tiny.gguf", model)
    for path in (file, tmp_path):
        assert model_name(path) == "tiny.gguf" and native_config(path).num_hidden_layers == 2
        loaded, tokenizer = load_model(path)
        ids = torch.tensor([tokenizer("A quest, 1212, for 3 llamas")["input_ids"] * 8])
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
            with patched(
                loaded, {"prefill": {"method": "flexprefill", "block_size": 16, "min_budget": 16, "min_length": 32}}
            ):
                loaded(ids)
                assert all(layer.prefill.sparse_calls == 1 for layer in sparsity_report(loaded).layers)
        assert load_weights(path, torch.bfloat16).dtype == torch.bfloat16, path


@pytest.mark.parametrize("pre, tokens", [("smollm", ["1", "2", "1", "2"]), ("gpt-2", ["12", "12"])])
def test_numbers_are_split_as_the_file_says(pre: str, tokens: list[str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "tiny.gguf", llama(), pre))
    assert tokenizer.convert_ids_to_tokens(tokenizer("1212")["input_ids"]) == tokens
    text = "It isn't  12,\n\tor <|end|> 1é"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def two_files(file: Path) -> Path:
    (file.parent / "b.gguf").write_bytes(file.read_bytes())
    return file.parent


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:2000])
    return file


def text(file: Path) -> Path:
    file.write_text("version https://git-lfs.github.com/spec/v1")
    return file


BAD = [
    (two_files, ": has 2 GGUF files; name one of them: a.gguf, b.gguf"),
    (cut, "a.gguf: cannot be read as GGUF: "),
    (text, "a.gguf: cannot be read as GGUF: it does not begin with GGUF; download it again"),
]


@pytest.mark.parametrize("damage, message", BAD, ids=[row[0].__name__ for row in BAD])
def test_what_cannot_be_loaded_is_one_line(damage: Any, message: str, tmp_path: Path) -> None:
    path = damage(write(tmp_path / "a.gguf", llama()))
    with pytest.raises(SparsePatchError) as error:
        load_model(path)
    said = str(error.value)
    assert said.startswith(f"--model: {tmp_path}") and message in said and said.isprintable() and len(said) <= 490
    assert damage is two_files or said.endswith("; download it again")


def test_the_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.gguf", llama())
    monkeypatch.setattr("sparse_patch.models.gguf.find_spec", lambda _: None)
    for load in (load_model, native_config, load_tokenizer):
        with pytest.raises(SparsePatchError) as error:
            load(file)
        assert str(error.value) == f'--model: {file}: the package gguf is missing; pip install "sparse_patch[gguf]"'


def test_a_checkpoint_comes_before_a_gguf_file_beside_it(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    (tmp_path / "other.gguf").write_text("not read")
    assert torch.equal(load_weights(tmp_path, torch.float32).lm_head.weight, model.lm_head.weight)
