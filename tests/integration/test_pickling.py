"""A patched model is saved, copied and sent whole; what is built from its config is plain."""

import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.model_state import marks
from families import FAMILIES, llama, vlm
from method_table import configurations
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_patch import PatchError, patch_model, patched, sparsity_report, unpatch_model

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ["flexprefill-coverage", "tidaldecode", "moa", "infllmv2"]
SPARSE = {"prefill": {"method": "a_shape", "block_size": 16, "sink": 16, "window": 16, "min_length": 0}}
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture
def five_layers() -> PreTrainedModel:
    return llama(layers=5)


def ids() -> torch.Tensor:
    return torch.randint(3, 90, (1, 290), generator=torch.Generator().manual_seed(1))


def generated(model: Any) -> torch.Tensor:
    answer: torch.Tensor = model.generate(ids(), **GREEDY)
    return answer


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def copied_twice(model: Any) -> Any:
    return copy.deepcopy(pickled(model))


@pytest.mark.parametrize("how", [copy.deepcopy, through_a_file, copied_twice])
@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_patched_and_lives_alone(
    name: str, how: Callable[[Any], Any], plans: Path, five_layers: PreTrainedModel
) -> None:
    config, plain = configurations(plans)[name], generated(five_layers)
    with patched(five_layers, config):
        sparse, before = generated(five_layers), sparsity_report(five_layers)
        twin = how(five_layers)
        assert torch.equal(generated(twin), sparse)
        assert sparsity_report(five_layers) == before, "the copy counts for itself"
        layer = sparsity_report(twin).layers[1]
        assert layer.prefill.calls == before.layers[1].prefill.calls + 1 or layer.decode.calls > 0
        unpatch_model(twin)
        assert torch.equal(generated(five_layers), sparse), "the original is still patched"
    assert torch.equal(generated(twin), plain) and marks(twin) == []
    assert "_prepare_cache_for_generation" not in vars(twin)
    with patched(twin, config):
        assert torch.equal(generated(twin), sparse)
    with pytest.raises(PatchError, match="is not patched"):
        unpatch_model(twin)


def of_itself(config: Any, model: Any) -> Any:
    return type(model)(config)


def by_auto(config: Any, model: Any) -> Any:
    return AutoModelForCausalLM.from_config(config)


def of_a_copy(config: Any, model: Any) -> Any:
    return type(model)(copy.deepcopy(config))


def of_a_pickled_one(config: Any, model: Any) -> Any:
    return type(model)(pickled(config))


def of_its_values(config: Any, model: Any) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict()))


@pytest.mark.parametrize("build", [of_itself, by_auto, of_a_copy, of_a_pickled_one, of_its_values])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_of_a_patched_models_config_is_plain(family: str, build: Callable[[Any, Any], Any]) -> None:
    """Also while the other model is patched; the new model can itself be patched, with another configuration."""
    model = FAMILIES[family]()
    plain = generated(model)
    with patched(model, SPARSE):
        sparse = generated(model)
        assert not torch.equal(sparse, plain)
        twin = build(model.config, model).float().eval()
        twin.load_state_dict(model.state_dict())
        twin.generation_config = copy.deepcopy(model.generation_config)
        assert torch.equal(generated(twin), plain)
        with patched(twin, SPARSE):
            assert torch.equal(generated(twin), sparse)
        with patched(twin, "dense.yaml"):
            assert torch.equal(generated(twin), plain)
            third = build(twin.config, twin).float().eval()
            third.load_state_dict(model.state_dict())
        unpatch_model(model)
        assert torch.equal(generated(twin), plain) and torch.equal(generated(model), plain)
        with torch.no_grad():
            assert torch.equal(third(ids()).logits, model(ids()).logits)
        patch_model(model, SPARSE)


@torch.no_grad()
def test_a_vision_model_of_a_patched_ones_config() -> None:
    model = vlm()
    expected = model(ids()).logits
    with patched(model, SPARSE):
        twin = type(model)(model.config).float().eval()
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(ids()).logits, expected)
        assert not torch.equal(model(ids()).logits, expected)
        whole = through_a_file(model)
        assert torch.equal(whole(ids()).logits, model(ids()).logits)
    assert torch.equal(unpatch_model(whole)(ids()).logits, expected) and marks(whole) == []


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_a_patched_model_saves_is_plain(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    plain = generated(model)
    with patched(model, SPARSE):
        model.save_pretrained(tmp_path)
        for text in (model.config.to_json_string(), str(model.config), str(model.config.to_diff_dict())):
            assert "sparse_patch" not in text
    assert not [file for file in tmp_path.glob("*.json") if "sparse_patch" in file.read_text()]
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation=model.config._attn_implementation
    )
    loaded.generation_config = model.generation_config
    assert torch.equal(generated(loaded.eval()), plain) and marks(loaded) == []


def test_a_config_that_was_taken_from_a_patched_model_names_no_patch_afterwards(five_layers: PreTrainedModel) -> None:
    with patched(five_layers, SPARSE):
        config = five_layers.config
    assert config._attn_implementation == "sdpa"


def test_a_config_alone_is_plain(five_layers: PreTrainedModel) -> None:
    """The config is loaded by a process that does not have sparse_patch, or that has patched nothing."""
    with patched(five_layers, SPARSE):
        stored = pickle.dumps(five_layers.config)
        assert b"sparse_patch" not in stored
        assert pickle.loads(stored)._attn_implementation == "sdpa"
        assert copy.deepcopy(five_layers.config)._attn_implementation == "sdpa"


def test_a_copy_has_no_hook_if_the_model_was_given_another_implementation(five_layers: PreTrainedModel) -> None:
    plain = generated(five_layers)
    with patched(five_layers, SPARSE):
        five_layers.set_attn_implementation("eager")
        for how in (copy.deepcopy, through_a_file):
            twin = how(five_layers)
            assert twin.config._attn_implementation == "eager" and not sparsity_report(twin).hook_active
            assert torch.equal(generated(twin), plain)


def work(model: nn.Module, path: Path, results: Any) -> None:
    """What another process does with the model that it was sent, and with one from a file."""
    torch.set_num_threads(1)
    found = []
    for one in (model, torch.load(path, weights_only=False)):
        found += [generated(one).tolist(), sparsity_report(one).layers[1].prefill.calls]
        unpatch_model(one)
        found += [generated(one).tolist(), marks(one)]
    results.put(found)


def test_a_spawned_process_gets_the_patched_model(five_layers: PreTrainedModel, tmp_path: Path) -> None:
    plain = generated(five_layers).tolist()
    with patched(five_layers, {**SPARSE, "decode": {"method": "quest", "min_length": 0, "budget": 64}}):
        sparse = generated(five_layers).tolist()
        torch.save(five_layers, tmp_path / "whole.pt")
        context = get_context("spawn")
        results = context.Queue()
        process = context.Process(target=work, args=(five_layers, tmp_path / "whole.pt", results))
        process.start()
        found = results.get(timeout=120)
        process.join()
    assert found == [sparse, 2, plain, []] * 2
