"""Tensor parallelism: two processes give what one gives, for every method. One start of the two serves all tests."""

import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from families import llama, phi3
from method_table import DECODE_METHODS, PREFILL_METHODS, SPAN_METHODS
from methods.test_sale import calibration
from methods.test_spans import write_plans
from torch import distributed
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel

from sparse_patch import patched, sparsity_report




PROMPT, NEW, SECONDS = 300, 6, 120
_TAU = torch.tensor([[4.0, 0.2, 0.0, 1.0]]).repeat(5, 1)
_PATTERNS = {
    "0": ["stream_llm", 40, 60, 1.0],
    "1": ["vertical_and_slash", 40, 104, 1.0],
    "2": ["block_sparse", 0, 0, 1.0],
    "3": ["stream_llm", 20, 100, 1.0],
}


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    """What is compared, by name: every row of the methods' table, and settings that differ from head to head."""
    phases = {"prefill": PREFILL_METHODS, "decode": DECODE_METHODS, "both": SPAN_METHODS}
    found = {case.name: {phase: _found(case.small, folder)} for phase, cases in phases.items() for case in cases}
    heads = {
        "sale-calibrated": {"method": "sale", "calibration": "sale.safetensors", "local_window": 32, "block_size": 64},
        "minference-calibrated": {
            "method": "minference", "calibration": "patterns.json", "block_budget": 48, "block_size": 16,
        },
    }  # fmt: skip
    found |= {name: {"prefill": {**_found(each, folder), "min_length": 0}} for name, each in heads.items()}
    return {"dense": {"both": {"method": "dense"}}} | found


def _found(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    if "calibration" not in settings:
        return settings
    return {**settings, "calibration": str(folder / settings["calibration"])}


CASES = list(configs(Path()))
PER_HEAD = ["sale-calibrated", "minference-calibrated", "moa", "duoattention"]
ALL_HEAD = ["delta", "tidaldecode-all", "lessismore"]


@torch.no_grad()
def generated(model: PreTrainedModel, **options: Any) -> dict[str, torch.Tensor]:
    """Tokens `[B, NEW]` and logits `[NEW, B, vocabulary]` after a padded batch."""
    ids = torch.randint(3, 90, (2, PROMPT), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    result: Any = model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True,
        **options,
    )  # fmt: skip
    return {"tokens": result.sequences[:, PROMPT:], "logits": torch.stack(result.logits)}


def outputs(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """What every configuration gives, and the shares that its heads computed, `[layer][head]`."""
    found = {"unpatched": generated(model)}
    for name, config in configs(folder).items():
        with patched(model, {**config, "on_unsupported": "error"}):
            found[name] = generated(model)
            report = sparsity_report(model)
        found[name]["heads"] = [layer.prefill.density_by_head for layer in report.layers]
        found[name]["sparse"] = sum(layer.prefill.sparse_calls + layer.decode.sparse_calls for layer in report.layers)
        found[name]["remarks"] = report.remarks
    compiled = CompileConfig(backend="eager", fullgraph=True)
    compiled._compile_all_devices = True
    for name in ALL_HEAD + PER_HEAD[2:3]:
        with patched(model, configs(folder)[name]):
            found[f"{name}, static"] = generated(model, cache_implementation="static")
        with patched(model, configs(folder)[name]):
            options = {"cache_implementation": "static", "compile_config": compiled}
            found[f"{name}, compiled"] = {**generated(model, **options), "compiled": sparsity_report(model).layers[2].compiled}
    found["unpatched again"] = generated(model)
    return found


def heads_on_every_rank(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    """The same of a model whose plan splits no heads."""
    found = {}
    for name in ("delta", "lessismore", "sale-calibrated", "moa"):
        config = configs(folder)[name]
        phase, settings = next(iter(config.items()))
        settings = {key: value for key, value in settings.items() if key not in ("calibration", "layers")}
        if phase == "decode":
            settings["layers"] = {"full": [0], "select": [1]}
        if name == "moa":
            settings = {"method": "streamingllm", "sink": 5, "window": 50}
        with patched(model, {phase: settings}):
            found[name] = generated(model)
    return found


def rank(number: int, folder: Path) -> None:
    """One of the two processes."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2")
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous", rank=number, world_size=2, timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    found = {}
    for name, function in (("llama", outputs), ("phi3", heads_on_every_rank)):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, tp_plan="auto").eval()
        found[name] = function(model, folder)
    torch.save(found, folder / f"rank{number}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and calibrations."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, model in (("llama", llama(layers=5)), ("phi3", phi3())):
        model.save_pretrained(folder / name)
    write_plans(folder)
    calibration(folder, _TAU)
    (folder / "patterns.json").write_text(json.dumps([_PATTERNS] * 5))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """What one process gives."""
    torch._dynamo.reset()
    functions = {"llama": outputs, "phi3": heads_on_every_rank}
    load = AutoModelForCausalLM.from_pretrained
    return {name: of(load(folder / name, dtype=torch.float32).eval(), folder) for name, of in functions.items()}


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """What each of two processes gives."""
    context: Any = mp.start_processes(rank, (folder,), nprocs=2, join=False, start_method="spawn")
    try:
        for _ in range(SECONDS):
            if context.join(timeout=1):
                break
        else:
            raise TimeoutError(f"the processes were not ready after {SECONDS} s")
    finally:
        for process in context.processes:
            process.kill()
    yield [torch.load(folder / f"rank{number}.pt") for number in range(2)]


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert torch.equal(found["tokens"], expected["tokens"])
    torch.testing.assert_close(found["logits"], expected["logits"], atol=2e-4, rtol=1e-4)  # sums in another order


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(name: str, alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    expected = alone["llama"][name]
    for found in ranks:
        check(found["llama"][name], expected)
    assert (expected["sparse"] > 0) == (name != "dense")


@pytest.mark.parametrize("name", CASES)
def test_each_rank_reports_its_own_heads(name: str, alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for layer, expected in enumerate(alone["llama"][name]["heads"]):
        of_ranks = [found["llama"][name]["heads"][layer] for found in ranks]
        if expected and all(of_ranks):
            assert sum(of_ranks, []) == pytest.approx(expected)
    remarks = [found["llama"][name]["remarks"][-1] for found in ranks]
    assert remarks == [f"tensor parallelism: the heads of rank {number} of 2 alone" for number in range(2)]


@pytest.mark.parametrize("name", PER_HEAD)
def test_settings_of_heads_differ_from_rank_to_rank(name: str, ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["llama"][name]["heads"] != ranks[1]["llama"][name]["heads"]


@pytest.mark.parametrize("name", ALL_HEAD + PER_HEAD[2:3])
@pytest.mark.parametrize("way", ["static", "compiled"])
def test_static_caches(name: str, way: str, alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        check(found["llama"][f"{name}, {way}"], alone["llama"][name])
        assert way == "static" or found["llama"][f"{name}, {way}"]["compiled"]


@pytest.mark.parametrize("name", ["delta", "lessismore", "sale-calibrated", "moa"])
def test_a_model_with_all_heads_on_every_rank(name: str, alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        check(found["phi3"][name], alone["phi3"][name])


def test_unpatching_gives_back_the_bits(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for name in ("unpatched again", "dense"):
            assert torch.equal(found["llama"][name]["logits"], found["llama"]["unpatched"]["logits"])
