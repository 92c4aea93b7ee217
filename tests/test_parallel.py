"""Tensor parallelism: two processes give the same as one, for every method. Both are started once for all tests."""

import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from builders.thresholds import sale_calibration
from families import llama, phi3
from method_table import DECODE_METHODS, PREFILL_METHODS, SMALL_MODEL, SPAN_METHODS, in_folder, write_plans
from torch import distributed
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel

from sparse_patch import patched, sparsity_report

pytestmark = pytest.mark.skipif(
    torch.accelerator.current_accelerator() is not None,
    reason="with such a build of torch Transformers takes the GPU, see test_gpu_parallel.py",
)
PROMPT, NEW = 300, 6
SECONDS = 120  # most seconds for the processes, and for waiting for each other
_TAU = torch.tensor([[4.0, 0.2, 0.0, 1.0]]).repeat(5, 1)
_PATTERNS = {
    "0": ["stream_llm", 40, 60, 1.0],
    "1": ["vertical_and_slash", 40, 104, 1.0],
    "2": ["block_sparse", 0, 0, 1.0],
    "3": ["stream_llm", 20, 100, 1.0],
}


def configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> configuration to compare: every row of the method table, and settings that differ between heads."""
    phases = {"prefill": PREFILL_METHODS, "decode": DECODE_METHODS, "both": SPAN_METHODS}
    found = {case.name: {phase: in_folder(case.small, folder)} for phase, cases in phases.items() for case in cases}
    heads = {
        "sale-calibrated": {"method": "sale", "calibration": "sale.safetensors", "window": 32, "block_size": 64},
        "minference-calibrated": {
            "method": "minference", "calibration": "patterns.json", "block_budget": 48, "block_size": 16,
        },
    }  # fmt: skip
    found |= {name: {"prefill": {**in_folder(each, folder), "min_length": 0}} for name, each in heads.items()}
    return {"dense": {"both": {"method": "dense"}}} | found


CASES = list(configs(Path()))
PER_HEAD = ["sale-calibrated", "minference-calibrated", "moa", "duoattention"]
STATIC = ["delta", "lessismore", "moa"]
# For a model that computes all heads on every rank.
UNSPLIT: dict[str, dict[str, Any]] = {
    "sale": {"prefill": {"method": "sale", "tau": 1.0, "window": 32, "block_size": 64, "min_length": 0}},
    "streamingllm": {"both": {"method": "streamingllm", "sink": 5, "window": 50}},
    **{
        method: {"decode": {"method": method, "budget": 160, "min_length": 0, "roles": {"full": [0], "select": [1]}}}
        for method in ("delta", "lessismore")
    },
}


@torch.no_grad()
def generated(model: PreTrainedModel, **options: Any) -> dict[str, torch.Tensor]:
    """Generate tokens `[B, NEW]` and logits `[NEW, B, vocabulary]` after a padded batch."""
    ids = torch.randint(3, 90, (2, PROMPT), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    result: Any = model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True,
        **options,
    )  # fmt: skip
    return {"tokens": result.sequences[:, PROMPT:], "logits": torch.stack(result.logits)}


def outputs(model: PreTrainedModel, folder: Path, compile_too: bool) -> dict[str, Any]:
    """The outputs of every configuration, and the shares that its heads computed in prefill, `[layer][head]`."""
    found: dict[str, Any] = {"unpatched": generated(model)}
    for name, config in configs(folder).items():
        with patched(model, {**config, "on_unsupported": "error"}):
            found[name] = generated(model)
            report = sparsity_report(model)
        found[name]["heads"] = [layer.prefill.density_by_head for layer in report.layers]
        found[name]["sparse"] = sum(layer.prefill.sparse_calls + layer.decode.sparse_calls for layer in report.layers)
        found[name]["remarks"] = report.remarks
    for name in STATIC:
        with patched(model, configs(folder)[name]):
            found[f"{name}, static"] = generated(model, cache_implementation="static")
    options = CompileConfig(backend="eager", fullgraph=True)
    options._compile_all_devices = True
    for name in STATIC[:2] if compile_too else []:
        with patched(model, configs(folder)[name]):
            found[f"{name}, compiled"] = generated(model, cache_implementation="static", compile_config=options)
            found[f"{name}, compiled"]["compiled"] = all(layer.compiled for layer in sparsity_report(model).layers)
    return found | {"unpatched again": generated(model)}


def unsplit_outputs(model: PreTrainedModel) -> dict[str, Any]:
    """The same for a model whose parallel plan splits no heads."""
    found = {}
    for name, config in UNSPLIT.items():
        with patched(model, config):
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
    model, unsplit = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, tp_plan="auto").eval()
        for name in ("llama", "phi3")
    )
    found = {"split": outputs(model, folder, compile_too=True), "unsplit": unsplit_outputs(unsplit)}
    torch.save(found, folder / f"rank{number}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and calibrations."""
    folder = tmp_path_factory.mktemp("parallel")
    llama(layers=5).save_pretrained(folder / "llama")
    phi3().save_pretrained(folder / "phi3")
    write_plans(folder, SMALL_MODEL)
    sale_calibration(folder, _TAU)
    (folder / "patterns.json").write_text(json.dumps([_PATTERNS] * 5))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """The outputs of one process."""
    return {"split": outputs(llama(layers=5), folder, compile_too=False), "unsplit": unsplit_outputs(phi3())}


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """The outputs of each of two processes."""
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
    yield [torch.load(folder / f"rank{number}.pt", weights_only=True) for number in range(2)]


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert torch.equal(found["tokens"], expected["tokens"])
    torch.testing.assert_close(found["logits"], expected["logits"], atol=2e-4, rtol=1e-4)  # sums in another order


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_what_one_gives(name: str, alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    expected = alone["split"][name]
    for found in ranks:
        check(found["split"][name], expected)
    assert (expected["sparse"] > 0) == (name != "dense")


@pytest.mark.parametrize("name", CASES)
def test_each_rank_reports_its_own_heads(name: str, alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for layer, expected in enumerate(alone["split"][name]["heads"]):
        of_ranks = [found["split"][name]["heads"][layer] for found in ranks]
        if expected and all(of_ranks):
            assert [*of_ranks[0], *of_ranks[1]] == pytest.approx(expected)
    remarks = [found["split"][name]["remarks"][-1] for found in ranks]
    assert remarks == [f"tensor parallelism: only the heads of rank {number} of 2" for number in range(2)]


@pytest.mark.parametrize("name", PER_HEAD)
def test_settings_of_heads_differ_from_rank_to_rank(name: str, ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["split"][name]["heads"] != ranks[1]["split"][name]["heads"]


@pytest.mark.parametrize("name", STATIC)
def test_a_static_cache(name: str, alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        check(found["split"][f"{name}, static"], alone["split"][name])


@pytest.mark.parametrize("name", STATIC[:2])
def test_the_compiled_step(name: str, alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    """The step is one graph without breaks, including the reduction over the ranks."""
    for found in ranks:
        assert found["split"][f"{name}, compiled"]["compiled"]
        check(found["split"][f"{name}, compiled"], alone["split"][name])


@pytest.mark.parametrize("name", UNSPLIT)
def test_a_model_with_all_heads_on_every_rank(name: str, alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        check(found["unsplit"][name], alone["unsplit"][name])


def test_unpatching_gives_back_the_bits(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for name in ("unpatched again", "dense"):
            assert torch.equal(found["split"][name]["logits"], found["split"]["unpatched"]["logits"])
