"""The report, compared with direct counting on real forwards."""

import copy
import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from together import at_once
from transformers import PreTrainedModel

from sparse_patch import capture_plans, patched, reset_report, sparsity_report
from sparse_patch.integration.patch import is_patched, states_on
from sparse_patch.integration.reporting import uncounted
from sparse_patch.plans import BlockPlan
from sparse_patch.report import SparsityReport, merged

SPARSE = {"prefill": {"method": "flexprefill", "block_size": 16, "min_budget": 16, "gamma": 0.5, "min_length": 64}}


@pytest.fixture
def llama() -> PreTrainedModel:
    return FAMILIES["llama"]()


def forward(model: PreTrainedModel, length: int, padding: int = 0) -> None:
    ids = torch.randint(3, 90, (2, length))
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask)


def test_density_is_pairs_over_the_causal_triangle(llama: PreTrainedModel) -> None:
    with patched(llama, SPARSE), capture_plans(llama) as plans:
        forward(llama, 200, padding=60)
        forward(llama, 50)  # dense: shorter than min_length
        report = sparsity_report(llama)
    long, short = 200 * 201 // 2 + 140 * 141 // 2, 2 * 50 * 51 // 2
    for layer in report.layers:
        plan = plans[layer.layer][0][1]
        assert isinstance(plan, BlockPlan)
        pairs = plan.mask().sum((0, 2, 3)) + short
        assert layer.prefill.density_by_head == pytest.approx((pairs / (long + short)).tolist())
        assert layer.prefill.density == pytest.approx((pairs.float().mean() / (long + short)).item())
        assert layer.prefill.attended == pytest.approx((pairs.float().mean() / (200 + 140 + 100)).item())
        assert (layer.prefill.calls, layer.prefill.sparse_calls) == (2, 1)
        assert layer.prefill.dense == {"shorter than min_length 64": 1}
    assert report.density() == pytest.approx(sum(layer.prefill.density or 0 for layer in report.layers) / 3)


def test_decode_counts_the_keys_of_each_token(llama: PreTrainedModel) -> None:
    with patched(llama, SPARSE):
        llama.generate(torch.randint(3, 90, (1, 30)), max_new_tokens=4, do_sample=False)
        report = sparsity_report(llama)
    assert report.layers[0].decode.calls == 3
    assert report.attended("decode") == pytest.approx((31 + 32 + 33) / 3)
    assert report.layers[0].decode.dense == {"no decode method": 3}
    assert report.fallbacks() == {}


def test_sliding_layers_attend_to_their_window(llama: PreTrainedModel) -> None:
    model = FAMILIES["mistral"]()
    window = model.config.sliding_window
    with patched(model, SPARSE):
        with torch.no_grad():
            model(torch.randint(3, 90, (1, 80)))
        report = sparsity_report(model)
    pairs = window * (window + 1) // 2 + (80 - window) * window
    assert report.layers[0].prefill.attended == pytest.approx(pairs / 80)
    assert report.density() == pytest.approx(pairs / (80 * 81 // 2))


def test_reset_and_no_calls(llama: PreTrainedModel) -> None:
    with patched(llama, SPARSE):
        forward(llama, 100)
        reset_report(llama)
        report = sparsity_report(llama)
        assert report.density() is None and report.attended() is None and report.layers[0].prefill.calls == 0
        assert "all" in str(report)


def test_it_prints_and_round_trips_as_json(llama: PreTrainedModel, tmp_path: Path) -> None:
    with patched(llama, SPARSE, on_unsupported="silent"):
        forward(llama, 200)
        with torch.no_grad():
            llama(torch.randint(3, 90, (1, 100)), output_attentions=True)
        report = sparsity_report(llama)
    text = str(report)
    assert "1 of 2" in text and "FALLBACK to dense, output_attentions: 3 calls" in text
    assert f"{report.density():.3f}" in text and report.fingerprint in text
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["config"]["prefill"]["gamma"] == 0.5 and saved["versions"].keys() >= {"torch", "transformers"}
    assert SparsityReport.model_validate(saved) == report


def test_reports_of_several_processes_add_up(llama: PreTrainedModel) -> None:
    """Two models that share the calls are compared with one that has all of them."""
    reports = []
    for lengths in ([(200, 60), (50, 0)], [(120, 0)], [(200, 60), (50, 0), (120, 0)]):
        with patched(llama, SPARSE):
            torch.manual_seed(1)
            for length, padding in lengths:
                forward(llama, length, padding)
            reports.append(sparsity_report(llama))
    whole = merged(reports[:2])
    assert [layer.prefill.calls for layer in whole.layers] == [3, 3, 3]
    assert whole.density() == pytest.approx(
        sum(report.pairs("prefill")[0] for report in reports[:2]) / reports[2].pairs("prefill")[1]
    )
    for layer, first, second in zip(whole.layers, reports[0].layers, reports[1].layers, strict=True):
        triangles = first.prefill.pairs[1], second.prefill.pairs[1]
        for head, density in enumerate(layer.prefill.density_by_head):
            parts = first.prefill.density_by_head[head], second.prefill.density_by_head[head]
            expected = (parts[0] * triangles[0] + parts[1] * triangles[1]) / sum(triangles)
            assert density == pytest.approx(expected)
        assert layer.prefill.dense == first.prefill.dense
    with patched(llama, SPARSE, prefill={"gamma": 0.9}), pytest.raises(ValueError, match="different configurations"):
        merged([reports[0], sparsity_report(llama)])


def test_what_runs_uncounted_is_not_reported(llama: PreTrainedModel) -> None:
    with patched(llama, SPARSE):
        forward(llama, 100)
        before = sparsity_report(llama)
        with pytest.raises(RuntimeError), uncounted(llama):
            forward(llama, 200)
            raise RuntimeError("out of memory")
        assert sparsity_report(llama) == before
        forward(llama, 100)
        assert sparsity_report(llama).layers[0].prefill.calls == 2
    assert not is_patched(llama)


QUEST = {"decode": {"method": "quest", "min_length": 0, "budget": 48, "layers": "all"}}
STREAMS = {"decode": {"method": "streamingllm", "sink": 2, "window": 30}}


def decode(model: PreTrainedModel, tokens: int, padding: int = 0) -> None:
    ids, mask = torch.randint(3, 90, (2, 100)), torch.ones(2, 100, dtype=torch.int64)
    mask[1, :padding] = 0
    options = {"max_new_tokens": tokens + 1, "min_new_tokens": tokens + 1, "do_sample": False}
    model.generate(ids, attention_mask=mask, **options)  # type: ignore[operator]


def pairs_by_head(report: SparsityReport) -> list[list[int]]:
    """Of decode, by layer."""
    phases = [layer.decode for layer in report.layers]
    return [[round(density * phase.pairs[1]) for density in phase.density_by_head] for phase in phases]


@pytest.mark.parametrize("config", [QUEST, STREAMS], ids=["pages", "spans"])
@pytest.mark.parametrize("most", [1, 7, 64])
def test_calls_that_wait_are_all_counted(
    config: dict[str, object], most: int, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever they are added up, the report has the pairs of the plans, with padding and without."""
    monkeypatch.setattr("sparse_patch.report.counts.MOST_WAITING", most)
    with patched(llama, config), capture_plans(llama) as plans:
        decode(llama, 10)
        decode(llama, 9, padding=30)
        report = sparsity_report(llama)
        assert sparsity_report(llama) == report
        for layer, found in zip(report.layers, pairs_by_head(report), strict=True):
            read = [plan for phase, plan in plans[layer.layer] if phase == "decode"]
            assert layer.decode.sparse_calls == len(read) == 19
            assert found == sum(plan.computed_pairs().sum(0) for plan in read).tolist()  # type: ignore[union-attr]
            assert layer.decode.pairs[1:] == (2 * sum(range(101, 111)) + sum(range(101, 110)) + sum(range(71, 80)), 38)
        assert all(len(state.counts.decode.waiting) < most for state in states_on(llama))


def test_calls_that_wait_belong_to_their_report_and_to_their_copy(llama: PreTrainedModel) -> None:
    with patched(llama, QUEST):
        decode(llama, 3)
        before = sparsity_report(llama)
        reset_report(llama)
        decode(llama, 3)
        copies = copy.deepcopy(llama), copy.deepcopy(copy.deepcopy(llama))
        for model in (llama, *copies):
            assert pairs_by_head(sparsity_report(model)) == pairs_by_head(before)
        decode(llama, 3)
        for model in copies:
            assert pairs_by_head(sparsity_report(model)) == pairs_by_head(before)
        twice = [[2 * pairs for pairs in heads] for heads in pairs_by_head(before)]
        assert pairs_by_head(sparsity_report(llama)) == twice


def test_threads_lose_no_call_that_waits(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_patch.report.counts.MOST_WAITING", 5)
    with patched(llama, QUEST):
        at_once([lambda: decode(llama, 11)])
        alone = pairs_by_head(sparsity_report(llama))
        reset_report(llama)
        at_once([lambda: decode(llama, 11)] * 3)
        expected = [[3 * pairs for pairs in heads] for heads in alone]
        assert pairs_by_head(sparsity_report(llama)) == expected
