"""Settings of methods with spans: their files, and what reports and plans say of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.spans import LENGTH, NEW, batch_of, generated, moa, rules_of
from families import llama, qwen3
from transformers import PreTrainedModel

from sparse_patch import ConfigError, capture_plans, load_config, patch_model, patched, sparsity_report
from sparse_patch.cli.inspection import KVBytes, inspect
from sparse_patch.plans import SpanPlan


def refused(model: PreTrainedModel, config: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        patch_model(model, config)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_plans_are_one_line(tmp_path: Path) -> None:
    model = llama()
    refused(
        model, "moa", 'prefill.calibration: moa needs head schedules for this model; run "sparse-patch calibrate moa'
    )
    refused(model, "duoattention", "duoattention needs head schedules for this model")
    refused(model, moa(tmp_path, model, rules_of(qwen3())), "was made for another model: model_type qwen3, this one")
    one = moa(tmp_path, model)["both"]
    refused(
        model,
        {"prefill": one, "decode": {**one, "calibration": "other.json"}},
        "dict: decode.calibration: other.json is not that of prefill",
    )
    with patched(model, {"prefill": one, "decode": {"method": "streamingllm"}}):
        pass


def test_published_files_are_read_and_the_report_says_to_what(tmp_path: Path) -> None:
    model = llama()
    rules = {"alphas": [[0, 2048, 0, 0]] * 3, "betas": [[0.5, 0, 0.25, 1.0]] * 3}
    (tmp_path / "moa.json").write_text(json.dumps(rules))
    (tmp_path / "gates.tsv").write_text("0.9\t0.1\n" * 3)
    for method, name, said in (
        ("moa", "moa.json", "moa: keeps 0.75 of the keys at 16384 tokens; "),
        ("duoattention", "gates.tsv", "3 of 6 KV heads are full, the others keep 64 + 256 tokens"),
    ):
        with patched(model, {"both": {"method": method, "calibration": str(tmp_path / name)}}):
            (remark,) = sparsity_report(model).remarks
        assert said in remark
    assert "rules of 4 heads as rules of 2 KV heads" not in remark


def test_a_plan_may_have_prompts_read_densely(tmp_path: Path) -> None:
    model, batch = llama(), batch_of()
    dense = generated(model, batch, 1).logits[0]
    rules = rules_of(model).model_copy(update={"prefill": "dense"})
    with patched(model, moa(tmp_path, model, rules)):
        result = generated(model, batch)
        report = sparsity_report(model)
    assert torch.equal(result.logits[0], dense)
    assert report.layers[0].prefill.dense == {"the head schedules have prompts read densely": 1}
    assert report.layers[0].decode.sparse_calls == NEW - 1


def test_a_file_counts_from_the_folder_of_the_yaml(tmp_path: Path) -> None:
    model = llama()
    moa(tmp_path, model)
    (tmp_path / "my.yaml").write_text("both:\n  method: moa\n  calibration: plan.json\n")
    config = load_config(tmp_path / "my.yaml")
    assert config.prefill == config.decode and config.settings()["decode"]["calibration"] == str(tmp_path / "plan.json")


def test_show_says_what_layers_keep(tmp_path: Path, needle_llama_path: Path) -> None:
    layers, kv = inspect(needle_llama_path, load_config("streamingllm", both={"layers": [1]}), 4096)
    assert kv == KVBytes(4096, 2 * 2 * 64 * 2 * (2004 + 7 * 4096), 2 * 2 * 64 * 2 * 8 * 4096)
    assert [layer["role"] for layer in layers[:3]] == ["", "keeps 2004 of 16384", ""]


def test_plans_are_captured(tmp_path: Path) -> None:
    model = llama()
    with patched(model, moa(tmp_path, model)), capture_plans(model) as plans:
        generated(model, batch_of(), 3)
    assert [phase for phase, _ in plans[0]] == ["prefill", "decode", "decode"]
    last = plans[1][-1][1]
    assert isinstance(last, SpanPlan) and last.capacity == LENGTH + 2 and last.mask().shape == (2, 4, 1, LENGTH + 2)
