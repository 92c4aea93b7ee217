"""SALE as a method: its plans, calibrations and promises. `test_low_bit_scores.py` tests the decisions."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bound import bound
from builders.thresholds import sale_calibration
from calls import make_call
from families import llama
from oracles.sale import SaleSettings, sale_selection
from pydantic import ValidationError
from safetensors.torch import save_file

from sparse_patch import ConfigError, load_config, patch_model, patched, sparsity_report
from sparse_patch.artefacts.thresholds import read_thresholds
from sparse_patch.call import AttentionCall
from sparse_patch.cli.inspection import inspect
from sparse_patch.integration.patch import is_patched
from sparse_patch.methods.sale import BoundSale, Sale
from sparse_patch.model_shape import ModelShape
from sparse_patch.ops.attention.block_sparse import attend
from sparse_patch.plans import BlockPlan, Dense

LLAMA = ModelShape("llama", num_layers=3, num_heads=4, num_kv_heads=2, hidden_size=64)


def sale(**settings: Any) -> Sale:
    return Sale.model_validate({"window": 32, "block_size": 64, "min_length": 0, **settings})


def plan_of(method: Sale, call: AttentionCall) -> BlockPlan:
    plan = bound(method).plan(call)
    assert isinstance(plan, BlockPlan)
    return plan


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("numerics", ["int4", "int8"])
@pytest.mark.parametrize("queries", [650, 200])
def test_the_plan_is_the_oracles_decisions_in_larger_tiles(numerics: str, block_size: int, queries: int) -> None:
    call = make_call(650, queries=queries, heads=(2, 1), head_dim=32)
    plan = plan_of(sale(tau=1.0, numerics=numerics, block_size=block_size), call)
    expected = sale_selection(call.q[0].numpy(), call.k[0].numpy(), call.scale, [1.0] * 2, SaleSettings(numerics, 32))
    assert expected.margins.min() > 1e-5, "take another seed: a decision is within rounding"
    per_side = block_size // 32
    first = (650 - queries) // 64
    for row, query_block in enumerate(plan.grid.query_block_ids[0].tolist()):
        mine = [m - first for m in range(first, first + expected.kept.shape[1]) if m * 64 // block_size == query_block]
        fine = torch.from_numpy(expected.kept[:, mine]).any(1)
        padded = torch.nn.functional.pad(fine, (0, plan.grid.num_key_blocks * per_side - fine.shape[-1]))
        assert torch.equal(plan.blocks()[0, :, row], padded.unflatten(-1, (-1, per_side)).any(-1))
    assert 0.3 < plan.density().mean() < 1


def test_tau_0_is_dense_attention(tmp_path: Path) -> None:
    """With every head at 0 the call is dense by design; with one head of a calibration at 0 it goes through the op."""
    call = make_call(400, head_dim=32)
    assert isinstance(bound(sale(tau=0.0)).plan(call), Dense) and isinstance(bound(sale(tau=9e-6)).plan(call), Dense)
    tau = torch.full((5, 4), 1.0)
    tau[0, 2] = 0
    method = sale(calibration=str(sale_calibration(tmp_path, tau)))
    plan = plan_of(method, call)
    assert plan.density()[0, 2] == 1 and plan.density()[0, [0, 1, 3]].max() < 1
    output, _, _ = attend(call, plan)
    expected = torch.nn.functional.scaled_dot_product_attention(
        call.q, call.k, call.v, is_causal=True, scale=call.scale, enable_gqa=True
    )
    torch.testing.assert_close(output[:, 2], expected[:, 2], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("numerics", ["int4", "int8"])
def test_plans_are_nested_in_tau(numerics: str) -> None:
    call = make_call(640, heads=(2, 1), head_dim=32, sharpness=0.7)
    blocks = [plan_of(sale(tau=tau, numerics=numerics), call).blocks() for tau in (2.0, 0.5, 0.1, 0.01)]
    for fewer, more in itertools.pairwise(blocks):
        assert (more | ~fewer).all()
    assert blocks[0].sum() < blocks[-1].sum()


def test_every_query_reads_a_key_and_none_after_it() -> None:
    call = make_call(333, queries=200, row_starts=[0, 70], head_dim=32)
    mask = plan_of(sale(tau=1e4), call).mask()
    position = torch.arange(133, 333)[:, None]
    assert not (mask & (torch.arange(333) > position)).any()
    assert mask.any(-1).all() and mask.diagonal(133, -2, -1).all()


def test_softcap_and_scale_reach_the_selection() -> None:
    call = make_call(500, head_dim=32, sharpness=2.0)
    base = plan_of(sale(tau=0.1), call).blocks()
    for change in ({"softcap": 1.0}, {"scale": 0.01}):
        assert (plan_of(sale(tau=0.1), AttentionCall(**{**vars(call), **change})).blocks() != base).any()


def test_what_is_dense_by_design() -> None:
    assert isinstance(bound(sale()).plan(make_call(160)), Dense), "all of it is in the reference region"
    assert isinstance(bound(sale()).plan(make_call(161)), BlockPlan)
    negative = AttentionCall(**{**vars(make_call(300)), "scale": -0.5})
    assert bound(sale()).plan(negative) == Dense("scale -0.5 is not positive")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"numerics": "int2"}, "numerics: expected 'int4' or 'int8', got str 'int2'"),
        ({"tau": -0.1}, "tau: expected greater than or equal to 0, got float -0.1"),
        ({"window": 100}, "window: expected a multiple of 32, got int 100"),
        ({"window": 0}, "window: expected greater than or equal to 32, got int 0"),
        ({"block_size": 32}, "block_size: expected 64 or 128, got int 32"),
        ({"calibration": 3}, "calibration: expected a valid string or null, got int 3"),
        ({"calibration": "no.safetensors"}, "calibration: no.safetensors: cannot be read: No such file or directory;"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config({"prefill": {"method": "sale", **settings}})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    tau = torch.rand(5, 4)
    path = sale_calibration(tmp_path, tau, prompt="kv_retrieval")
    found = read_thresholds(path)
    assert torch.equal(found.tau, tau) and found.header.settings["prompt"] == "kv_retrieval"
    assert (found.numerics, found.window, found.block_size, found.error) == ("int8", 32, 64, 0.4)
    assert found.header.model.num_kv_heads == 2 and [file.name for file in tmp_path.iterdir()] == ["sale.safetensors"]
    method = bound(sale(calibration=str(path)))
    assert isinstance(method, BoundSale) and method.head_thresholds(3, 4) == tuple(tau[3].tolist())


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tau: expected float32 \[5, 4\] .*, got float32 \[4, 5\]$"):
        sale_calibration(tmp_path, torch.rand(4, 5))
    with pytest.raises(ValueError, match=r"^tau: layer 1, head 2: expected a number of 0 or more, got -1.0$"):
        sale_calibration(tmp_path, torch.ones(5, 4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(-1.0)))


def metadata(**changes: str | None) -> dict[str, str]:
    whole = {"model_type": "llama", "num_layers": "5", "num_heads": "4", "num_kv_heads": "2", "hidden_size": "64"}
    whole |= {"numerics": "int8", "local_window": "32", "block_size": "64", "error": "0.4", "sparse_patch": "0.1.0"}
    return {key: value for key, value in (whole | changes).items() if value is not None}


BAD_FILES: list[tuple[dict[str, torch.Tensor], dict[str, str] | None, str]] = [
    ({"tau": torch.ones(5, 4)}, None, "metadata model_type: missing; run"),
    ({"tau": torch.ones(5, 4)}, metadata(error=None), "metadata error: missing; run"),
    (
        {"tau": torch.ones(5, 4)},
        metadata(num_layers="five"),
        "metadata num_layers: expected a whole number, got 'five'",
    ),
    ({"tau": torch.ones(5, 4)}, metadata(error="nan"), "metadata error: expected a number, got 'nan'"),
    ({"tau": torch.ones(5, 4)}, metadata(error="1e30"), "metadata error: expected at most 2147483647, got '1e30'"),
    (
        {"tau": torch.ones(5, 4)},
        metadata(num_heads="9" * 5000),
        "metadata num_heads: expected a whole number, got '9999",
    ),
    ({"tau": torch.ones(5, 4)}, metadata(block_size=str(10**30)), "metadata block_size: expected at most 2147483647"),
    ({"tau": torch.ones(5, 4)}, metadata(numerics="a\nb" * 9999), r"was made with numerics a\nba\nb"),
    (
        {"tau": -torch.full((5, 4), torch.inf)},
        metadata(),
        "tau: layer 0, head 0: expected a number of 0 or more, got -inf",
    ),
    (
        {"tau": torch.ones(5, 4)},
        metadata(num_layers="6"),
        "tau: expected float32 [6, 4] (layers, query heads), got flo",
    ),
    (
        {"tau": torch.ones(5, 4).half()},
        metadata(),
        "tau: expected float32 [5, 4] (layers, query heads), got float16 [5",
    ),
    (
        {"tau": torch.full((5, 4), torch.nan)},
        metadata(),
        "tau: layer 0, head 0: expected a number of 0 or more, got nan",
    ),
    ({"threshold": torch.ones(5, 4)}, metadata(), "expected one tensor, tau, got threshold; run"),
    ({"tau": torch.ones(5, 4), "x": torch.ones(1)}, metadata(), "expected one tensor, tau, got"),
    (
        {"tau": torch.ones(5, 4)},
        metadata(numerics="int4"),
        "was made with numerics int4, the configuration has int8; s",
    ),
    (
        {"tau": torch.ones(5, 4)},
        metadata(local_window="128"),
        "was made with window 128, the configuration has 32",
    ),
    (
        {"tau": torch.ones(5, 4)},
        metadata(block_size="256"),
        "was made with block_size 256, and the configuration's 128 computes less; set block_size: 256, or run",
    ),
]


@pytest.mark.parametrize("tensors, said, message", BAD_FILES, ids=[row[2][:40] for row in BAD_FILES])
def test_a_bad_file_is_one_line(
    tmp_path: Path, tensors: dict[str, torch.Tensor], said: dict[str, str] | None, message: str
) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path, said)
    with pytest.raises(ConfigError) as error:
        load_config("sale", prefill={"calibration": str(path), "window": 32})
    assert str(error.value).startswith(f"sale.yaml: prefill.calibration: {path}: {message}")
    assert str(error.value).isprintable() and len(str(error.value)) <= 490


def test_a_file_that_is_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad: is not a safetensors file \(.*calibrate sale"):
        load_config("sale", prefill={"calibration": str(tmp_path / "bad")})
    with pytest.raises(ConfigError, match=r"cannot be read|is not a safetensors file"):
        load_config("sale", prefill={"calibration": str(tmp_path)})


@pytest.mark.parametrize("change, message", [
    ({"num_layers": 2}, "num_layers 2, this one has 3"), ({"num_kv_heads": 4}, "num_kv_heads 4, this one has 2"),
    ({"hidden_size": 32}, "hidden_size 32, this one has 64"), ({"model_type": "qwen3"}, "model_type qwen3, this one"),
])  # fmt: skip
def test_a_calibration_of_another_model_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = llama()
    path = sale_calibration(tmp_path, shape=ModelShape(**{**vars(LLAMA), **change}))
    with pytest.raises(ConfigError) as error:
        patch_model(model, "sale", prefill={"calibration": str(path), "window": 32})
    assert str(error.value).startswith(f"sale.yaml: prefill.calibration: {path}: was made for another model: {message}")
    assert not is_patched(model)


def test_a_model_runs_with_a_calibration_and_says_so(tmp_path: Path) -> None:
    model, ids = llama(), torch.randint(3, 90, (1, 300))
    tau = torch.full((3, 4), 3.0)
    tau[1] = 0
    settings = {"window": 32, "block_size": 64, "min_length": 0}
    with torch.no_grad(), patched(model, "sale", prefill={**settings, "tau": 3.0}):
        assert model(ids).logits.isfinite().all()
        report = sparsity_report(model)
    assert [layer.prefill.sparse_calls for layer in report.layers] == [1, 1, 1] and report.fallbacks() == {}
    text = " ".join(str(report).split())
    assert "sale: uncalibrated, tau 3.0 for every head" in text
    assert (
        f"density of the decisions {report.decided():.3f}, of the blocks that hold them {report.density():.3f}" in text
    )
    decided, density = report.decided(), report.density()
    assert decided is not None and density is not None and 0 < decided < density
    assert json.loads(report.model_dump_json())["remarks"] == report.remarks != []
    path = sale_calibration(tmp_path, tau, LLAMA)
    with torch.no_grad(), patched(model, "sale", prefill={**settings, "calibration": str(path)}):
        assert model(ids).logits.isfinite().all()
        report = sparsity_report(model)
    assert [layer.prefill.sparse_calls for layer in report.layers] == [1, 0, 1], "all heads of layer 1 are dense"
    assert report.remarks == [] and report.layers[1].prefill.dense == {"tau: 0 for every head": 1}


def test_the_fingerprint_follows_the_content_of_the_file(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return load_config("sale", prefill={"calibration": str(path), "window": 32}).fingerprint()

    path = sale_calibration(tmp_path)
    before = fingerprint()
    sale_calibration(tmp_path, torch.ones(5, 4))
    assert fingerprint() != before


def test_show_names_what_is_not_calibrated(tmp_path: Path, needle_llama_path: Path) -> None:
    layers, _ = inspect(needle_llama_path, load_config("sale", prefill={"layers": [0, 2]}))
    assert [layer["role"] for layer in layers[:3]] == ["uncalibrated", "", "uncalibrated"]
    layers, _ = inspect(
        needle_llama_path, load_config(["sale", {"decode": {"method": "delta", "roles": {"full": [0]}}}])
    )
    assert [layer["role"] for layer in layers[:2]] == ["uncalibrated, select", "uncalibrated, sparse"]


def test_a_call_with_fewer_heads_than_the_calibration_is_dense(tmp_path: Path) -> None:
    method = sale(calibration=str(sale_calibration(tmp_path)))
    assert "tensor parallelism" in bound(method).plan(make_call(300, heads=(2, 1))).reason  # type: ignore[union-attr]


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        sale().tau = 1.0  # type: ignore[misc]
