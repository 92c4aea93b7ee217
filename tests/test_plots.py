"""Pictures are written, and they show the plan."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bound import bound
from calls import make_call
from families import FAMILIES
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from sparse_patch import SparsePatchError, capture_plans, patched, sparsity_report
from sparse_patch.methods.infllmv2 import InfLLMv2
from sparse_patch.plans import BlockPlan, SpanPlan, TokenBlockPlan
from sparse_patch.plots import (
    Captured,
    _lines,
    draw_blocks,
    draw_density,
    last_sparse_plan,
    plot_accuracy,
    plot_sparsity,
)
from sparse_patch.report import SparsityReport

SPARSE = {"prefill": {"method": "flexprefill", "block_size": 16, "min_budget": 16, "gamma": 0.5, "min_length": 64}}


@pytest.fixture(scope="module")
def recorded() -> tuple[SparsityReport, Captured]:
    model = FAMILIES["llama"]()
    with patched(model, SPARSE, prefill={"layers": [0, 2]}), capture_plans(model) as plans, torch.no_grad():
        model(torch.randint(3, 90, (1, 200)))
        return sparsity_report(model), dict(plans)


@pytest.mark.parametrize("heads", [None, [(0, 1), (2, 3)]])
def test_it_writes_a_picture(
    recorded: tuple[SparsityReport, Captured], tmp_path: Path, heads: list[tuple[int, int]] | None
) -> None:
    plot_sparsity(*recorded, tmp_path / "a.png", heads)
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 10_000


def test_the_block_map_is_the_plan(recorded: tuple[SparsityReport, Captured]) -> None:
    plan = last_sparse_plan(recorded[1][2])
    assert isinstance(plan, BlockPlan)
    axes = Figure().add_subplot()
    draw_blocks(axes, {2: plan}, 2, 1, ListedColormap)
    drawn = torch.from_numpy(axes.images[0].get_array().data)
    assert torch.equal(drawn == 2, plan.blocks()[0, 1])
    assert torch.equal(drawn > 0, plan.grid.causal[0])


def test_spans_are_drawn_as_the_blocks_of_their_mask() -> None:
    call = make_call(700, queries=330)
    plan = SpanPlan.of(call, (130, 0), (200, None))
    assert last_sparse_plan([("prefill", plan), ("decode", plan)]) is plan
    for head, mask in enumerate(plan.mask()[0]):
        axes = Figure().add_subplot()
        draw_blocks(axes, {0: plan}, 0, head, ListedColormap)
        drawn = torch.from_numpy(axes.images[0].get_array().data)
        whole = torch.zeros(768, 768, dtype=torch.bool)
        whole[370:700, :700] = mask
        assert torch.equal(drawn == 2, whole.view(6, 128, 6, 128).any(3).any(1)[2:])


def test_blocks_by_the_token_are_drawn_where_any_token_reads_one() -> None:
    call = make_call(600)
    plan = bound(InfLLMv2(topk=3, window_size=64, min_length=0)).plan(call)
    assert isinstance(plan, TokenBlockPlan) and last_sparse_plan([("prefill", plan)]) is plan
    for head, mask in enumerate(plan.mask()[0]):
        axes = Figure().add_subplot()
        draw_blocks(axes, {0: plan}, 0, head, ListedColormap)
        whole = torch.zeros(640, 640, dtype=torch.bool)
        whole[:600, :600] = mask
        drawn = torch.from_numpy(axes.images[0].get_array().data)
        assert torch.equal(drawn == 2, whole.view(10, 64, 10, 64).any(3).any(1))


def test_the_heat_map_is_the_report(recorded: tuple[SparsityReport, Captured]) -> None:
    axes = Figure().add_subplot()
    draw_density(axes, recorded[0])
    drawn = axes.images[0].get_array()
    assert drawn.shape == (3, 4) and (drawn[1] == 1).all()
    assert drawn[0].tolist() == pytest.approx(recorded[0].layers[0].prefill.density_by_head)


def test_what_cannot_be_drawn_is_one_line(
    recorded: tuple[SparsityReport, Captured], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, plans = recorded
    with pytest.raises(SparsePatchError, match="no sparse layer 1 with a head 0"):
        plot_sparsity(report, plans, tmp_path / "a.png", [(1, 0)])
    for heads in ([0, 1], [(0, 1, 2)], [(0, "a")], "ab", 3, [(0, 1.5)]):
        with pytest.raises(SparsePatchError, match=r"plot: heads: expected pairs \(layer, head\)"):
            plot_sparsity(report, plans, tmp_path / "a.png", heads)  # type: ignore[arg-type]
    with pytest.raises(SparsePatchError, match="no sparse prefill was captured"):
        plot_sparsity(report, {1: plans[1]}, tmp_path / "a.png")
    with pytest.raises(SparsePatchError, match=r"a\.docx: cannot be drawn: expected one of \..*png"):
        plot_sparsity(report, plans, tmp_path / "a.docx")
    for wrong in ("no/a.png", "a\0b.png", f"{'x' * 5000}.png"):
        with pytest.raises(SparsePatchError, match=r"png: cannot be written: "):
            plot_sparsity(report, plans, tmp_path / wrong)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SparsePatchError, match=r'pip install "sparse_patch\[plots\]"'):
        plot_sparsity(report, plans, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_accuracy_lines_are_scores_against_shares(tmp_path: Path) -> None:
    """Prefill methods are drawn by density, decode methods by keys read relative to dense."""
    figures = {"dense": (1.0, 0.9, 400.0), "a": (0.5, 0.8, 400.0), "b": (0.2, 0.6, 400.0), "d": (1.0, 0.7, 100.0)}
    rows = [
        {"config": config, "task": "vt", "length": 9, "density": density, "score": score, "attended": attended}
        for config, (density, score, attended) in figures.items()
    ]
    flex, delta = {"method": "flexprefill"}, {"method": "delta"}
    configs = {"dense": {"prefill": {"method": "dense"}, "decode": {"method": "dense"}}, "a": {"prefill": flex}}
    result = {"rows": rows, "configs": {**configs, "b": {"prefill": flex}, "d": {"decode": delta}}}
    assert _lines(result, 9, "score") == {
        "dense": [(1.0, 0.9, "dense")],
        "flexprefill": [(0.5, 0.8, "a"), (0.2, 0.6, "b")],
        "delta": [(0.25, 0.7, "d")],
    }
    plot_accuracy(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "settings, gradients, reason",
    [
        ({"prefill": {"method": "flexprefill", "min_length": 64}}, True, "gradients are needed (use torch.no_grad for"),
        ({"prefill": {"method": "flexprefill", "min_length": 4096}}, False, "shorter than min_length 4096"),
        ({"decode": {"method": "quest"}}, False, "no prefill method"),
    ],
    ids=["gradients", "short", "decode"],
)
def test_a_picture_of_dense_prefills_names_the_true_reason(
    settings: dict[str, Any], gradients: bool, reason: str, tmp_path: Path
) -> None:
    model = FAMILIES["llama"]()
    with patched(model, {**settings, "on_unsupported": "silent"}), capture_plans(model) as plans:
        with torch.set_grad_enabled(gradients):
            model(torch.randint(3, 90, (1, 200)))
        with pytest.raises(SparsePatchError) as error:
            plot_sparsity(sparsity_report(model), plans, tmp_path / "a.png")
    layers = model.config.num_hidden_layers
    assert str(error.value).startswith(
        f"plot: no sparse prefill was captured: all {layers} layers were dense: {reason}"
    )
