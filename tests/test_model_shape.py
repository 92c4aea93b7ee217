"""What is known about a model before it runs: heads of full layers, kinds of layers, whose keys a layer reads."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from families import FAMILIES, gemma3n, gemma4, llama4, mllama, qwen3_next
from transformers import GPTBigCodeConfig, PreTrainedConfig

from sparse_patch import load_config
from sparse_patch.cli.inspection import inspect
from sparse_patch.model_shape import ModelShape, attention_kind, kv_heads_of, layer_with_keys


@pytest.mark.parametrize(
    "build, kinds",
    [
        (gemma4, ["sliding", "full", "sliding", "full", "sliding", "full"]),
        (llama4, ["chunked", "full", "chunked", "full"]),
        (qwen3_next, ["linear", "full", "linear", "full"]),
        (mllama, ["full", "cross", "full", "cross", "full"]),
        (FAMILIES["mistral"], ["sliding"] * 3),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_kinds_of_layers(build: object, kinds: list[str]) -> None:
    config = build().config.get_text_config(decoder=True)  # type: ignore[operator]
    assert [attention_kind(config, layer) for layer in range(len(kinds))] == kinds
    shape = ModelShape.of(config, len(kinds))
    assert shape.local_layers == {layer for layer, kind in enumerate(kinds) if kind != "full"}


def test_attention_beside_a_recurrence_is_full_or_sliding_as_any_other() -> None:
    """Falcon-H1 and Zaya, and the name of full layers in older configs."""
    kinds = ["hybrid", "hybrid_sliding", "conv", "attention", "full_attention", "indexed_attention"]
    config = PreTrainedConfig(layer_types=kinds)
    expected = ["full", "sliding", "conv", "full", "full", "indexed"]
    assert [attention_kind(config, layer) for layer in range(6)] == expected


def test_multi_query_attention_has_one_kv_head() -> None:
    assert kv_heads_of(GPTBigCodeConfig(n_head=4, multi_query=True)) == 1
    assert kv_heads_of(GPTBigCodeConfig(n_head=4, multi_query=False)) == 4
    of_older_configs = SimpleNamespace(num_attention_heads=4, num_key_value_heads=None, multi_query=True)
    assert kv_heads_of(of_older_configs) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("build", [gemma3n, gemma4])
def test_the_last_layers_read_the_keys_of_the_last_of_their_kind(build: object) -> None:
    config = build().config  # type: ignore[operator]
    assert [layer_with_keys(config, layer) for layer in range(6)] == [0, 1, 2, 3, 2, 3]


def test_kv_heads_are_those_of_full_layers() -> None:
    config = gemma4().config
    assert config.per_layer_config[0].num_key_value_heads == 2
    assert ModelShape.of(config, 6).num_kv_heads == 1


def test_show_knows_the_heads_of_each_layer(tmp_path: Path) -> None:
    gemma4(256, 512).config.save_pretrained(tmp_path)
    layers, _ = inspect(tmp_path, load_config("flexprefill.yaml"))
    assert [layer["head_dim"] for layer in layers] == [256, 512] * 3
    assert [layer["kv_heads"] for layer in layers] == [2, 1] * 3
