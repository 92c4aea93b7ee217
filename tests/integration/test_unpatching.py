"""Patched models, their copies and their neighbours: each is unpatched separately, to the last bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from builders.scenarios import DENSE, assert_same, counted_calls, forward, generate, implementations, text_attention
from families import llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from sparse_patch import patch_model, patched, unpatch_model
from sparse_patch.integration.names import HOOK

pytestmark = pytest.mark.usefixtures("one_thread")  # models this small gain nothing from threads


def test_unpatching_restores_a_model_that_a_context_left_by_an_exception() -> None:
    model = llama()
    strings, before = implementations(model), forward(model)
    with pytest.raises(ZeroDivisionError), patched(model, DENSE):
        assert implementations(model) != strings
        1 / 0  # noqa: B018
    with counted_calls() as calls:
        assert_same(forward(model), before)
    assert not calls
    assert implementations(model) == strings


def two_models_from_one_config() -> tuple[PreTrainedModel, PreTrainedModel]:
    config = llama().config
    torch.manual_seed(1)
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    assert first.config is second.config, "Transformers copies the config by now: this test shows nothing"
    return first, second


def test_patching_a_model_leaves_another_of_the_same_config_alone() -> None:
    first, second = two_models_from_one_config()
    strings, before_first, before_second = implementations(second), generate(first), generate(second)

    patch_model(first, DENSE)
    with counted_calls() as calls:
        assert_same(generate(second), before_second)
        assert not calls
        assert_same(generate(first), before_first)
        assert set(calls) == set(text_attention(first))
    assert implementations(second) == strings

    unpatch_model(first)
    assert_same(generate(first), before_first)
    assert implementations(first) == strings
    assert implementations(second) == strings


def test_unpatching_a_model_leaves_another_of_the_same_config_patched() -> None:
    first, second = two_models_from_one_config()
    strings, before = implementations(second), forward(second)
    patch_model(first, DENSE)
    patch_model(second, DENSE)
    unpatch_model(first)
    with counted_calls() as calls:
        assert_same(forward(second), before)
        assert set(calls) == set(text_attention(second))
        forward(first)
        assert set(calls) == set(text_attention(second))
    unpatch_model(second)
    assert implementations(first) == implementations(second) == strings


def test_a_deep_copy_of_a_patched_model_is_unpatched_on_its_own() -> None:
    model = llama()
    strings, before = implementations(model), generate(model)
    patch_model(model, DENSE)
    clone = copy.deepcopy(model)
    with counted_calls() as calls:
        assert_same(generate(clone), before)
    assert set(calls) == set(text_attention(clone))

    unpatch_model(clone)
    assert implementations(clone) == strings
    with counted_calls() as calls:
        assert_same(generate(clone), before)
        assert not calls
        assert_same(generate(model), before)
        assert set(calls) == set(text_attention(model))

    unpatch_model(model)
    assert implementations(model) == strings


def test_a_saved_patched_model_reloads_unpatched(tmp_path: Path) -> None:
    model = llama()
    strings, before = implementations(model), forward(model)
    patch_model(model, DENSE)
    model.save_pretrained(tmp_path)
    assert not [file.name for file in tmp_path.glob("*.json") if HOOK in file.read_text()]

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert implementations(reloaded) == strings
    with counted_calls() as calls:
        assert_same(forward(reloaded), before)
    assert not calls
    assert implementations(model) != strings  # saving did not unpatch the model itself
