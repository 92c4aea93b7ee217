"""MInference against the slow oracle, its files, and MInference's own promises."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bound import bound
from calls import make_call, row_alone
from families import llama
from method_table import SMALL_MODEL
from oracles.minference import minference_mask, token_sets

from sparse_patch import ConfigError, load_config, patch_model, patched, sparsity_report
from sparse_patch.artefacts.patterns import MISSING, Pattern, read_patterns
from sparse_patch.call import AttentionCall
from sparse_patch.integration.patch import is_patched
from sparse_patch.methods.minference import BoundMInference, MInference
from sparse_patch.ops.attention.block_sparse import attend
from sparse_patch.plans import BlockPlan, Dense

# Float32 sums and the oracle's float64 ones may fall on different sides of a threshold that is closer than this.
MARGIN = 1e-5
VS, STREAM, BLOCKS = "vertical_and_slash", "stream_llm", "block_sparse"
MIXED = (Pattern(VS, 40, 104), Pattern(STREAM, 20, 50), Pattern(BLOCKS, 0, 0), Pattern(VS, 100, 100))


def compare_with_oracle(method: MInference, call: AttentionCall, patterns: tuple[Pattern, ...]) -> tuple[int, int]:
    """Assert equality for every head whose selection is not within rounding: `(heads compared, heads in doubt)`."""
    q, k = call.q[0].double().numpy(), call.k[0].double().numpy()
    plan = method.plan_by(call, patterns)
    assert isinstance(plan, BlockPlan)
    mask, margins = minference_mask(
        q, k, call.scale, list(patterns), method.block_size, method.block_budget, call.softcap
    )
    clear = torch.from_numpy(margins > MARGIN)
    wrong = (plan.mask()[0] != torch.from_numpy(mask)).flatten(1).any(-1) & clear
    assert not wrong.any(), f"heads {wrong.nonzero().flatten().tolist()}"
    return int(clear.sum()), int((~clear).sum())


@pytest.mark.parametrize("block_size", [16, 64])
def test_mixed_plans_equal_the_oracle(block_size: int) -> None:
    compared = in_doubt = 0
    for number, (length, queries) in enumerate(itertools.product((191, 192, 193, 260, 301), (None, 150, 65))):
        method = MInference(block_size=block_size, block_budget=3 * block_size, min_length=0)
        softcap = [None, 5.0][number % 2]
        call = make_call(length, queries=queries, heads=[(4, 2), (4, 1)][number % 2], seed=number, softcap=softcap)
        done, doubtful = compare_with_oracle(method, call, MIXED)
        compared, in_doubt = compared + done, in_doubt + doubtful
    assert in_doubt < 0.05 * compared


@pytest.mark.parametrize("length", [101, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("heads", [(2, 2), (7, 1)])
def test_the_plan_equals_the_oracle_at_block_edges(length: int, heads: tuple[int, int]) -> None:
    method = MInference(vertical=35, slash=100, block_size=32, min_length=0)
    patterns = (Pattern(VS, 35, 100),) * heads[0]
    compared, in_doubt = compare_with_oracle(method, make_call(length, heads=heads, seed=length), patterns)
    assert in_doubt <= 1 and compared >= 1


@pytest.mark.parametrize("queries", [300, 130])
def test_all_that_was_selected_is_read_once(queries: int) -> None:
    """Every causal pair in V or S is read, including the forced keys and distances; nothing is read twice."""
    call = make_call(300, queries=queries, heads=(2, 1))
    plan = bound(MInference(vertical=50, slash=110, block_size=32, min_length=0)).plan(call)
    assert isinstance(plan, BlockPlan)
    mask = plan.mask()[0]
    i, j = torch.arange(300 - queries, 300)[:, None], torch.arange(300)
    for head in range(2):
        q, k = call.q[0, head].double().numpy(), call.k[0, 0].double().numpy()
        verticals, slashes, _ = token_sets(q, k, call.scale, None, 50, 110)
        assert set(range(30)) <= set(verticals) and set(range(100)) <= set(slashes)
        wanted = (torch.isin(j, torch.tensor(verticals)) | torch.isin(i - j, torch.tensor(slashes))) & (j <= i)
        assert mask[head][wanted].all()
    assert torch.equal(plan.computed_pairs()[0], mask.sum((-1, -2))), "a pair is counted, so read, twice"


def test_a_padded_row_of_mixed_heads_equals_the_row_alone() -> None:
    method = MInference(block_size=16, block_budget=48, min_length=0)
    batch = make_call(400, queries=170, row_starts=[0, 7, 64, 129, 340, 399])
    plan = method.plan_by(batch, MIXED)
    assert isinstance(plan, BlockPlan)
    output, _, _ = attend(batch, plan)
    assert output[:, :, -1].isfinite().all()
    for row in range(6):
        alone, real = row_alone(batch, row)
        alone_plan = method.plan_by(alone, MIXED)
        start = int(batch.kv_start[row])  # type: ignore[index]
        mask = plan.mask()[row, :, real, start:]
        if isinstance(alone_plan, Dense):
            assert row >= 4 and torch.equal(mask, torch.ones_like(mask).tril(alone.q_start))
        else:
            assert row < 4 and torch.equal(mask, alone_plan.mask()[0])


def test_garbage_that_is_nan_stays_in_the_padding() -> None:
    batch = make_call(300, row_starts=[0, 90])
    method = MInference(vertical=40, slash=104, block_size=16, min_length=0)
    expected = bound(method).plan(batch).mask()  # type: ignore[union-attr]
    k = batch.k.clone()
    k[1, :, :90] = torch.nan
    plan = bound(method).plan(AttentionCall(**{**vars(batch), "k": k}))
    assert torch.equal(plan.mask(), expected)  # type: ignore[union-attr]


def test_heads_of_one_pattern_do_not_feel_the_others() -> None:
    call = make_call(300)
    method = MInference(block_size=16, block_budget=48, min_length=0)
    mixed = method.plan_by(call, MIXED).mask()  # type: ignore[union-attr]
    for head, pattern in enumerate(MIXED):
        uniform = method.plan_by(call, (pattern,) * 4).mask()  # type: ignore[union-attr]
        assert torch.equal(mixed[:, head], uniform[:, head])


def test_plans_are_nested_in_their_sizes() -> None:
    """Each plan holds the one before. A vertical within the slashes adds nothing, so not every plan is larger."""
    call = make_call(600)
    methods = [
        MInference(vertical=vertical, slash=slash, block_size=16, min_length=0)
        for vertical, slash in ((30, 100), (90, 100), (90, 120), (250, 180))
    ]
    masks = [bound(method).plan(call).mask() for method in methods]  # type: ignore[union-attr]
    for smaller, larger in itertools.pairwise(masks):
        assert (larger | ~smaller).all()
    assert masks[0].sum() < masks[1].sum() < masks[3].sum()


@pytest.mark.parametrize("sizes", [{"vertical": 299, "slash": 0}, {"vertical": 0, "slash": 299}], ids=str)
def test_one_token_less_than_everything_goes_through_the_op(sizes: dict[str, int]) -> None:
    call = make_call(300)
    plan = bound(MInference(**sizes, block_size=16, min_length=0)).plan(call)
    assert isinstance(plan, BlockPlan) and plan.density().min() > 0.99
    assert isinstance(bound(MInference(**sizes, block_size=16, min_length=0)).plan(make_call(299)), Dense)


def test_softcap_and_scale_reach_the_selection() -> None:
    call = make_call(500, sharpness=3.0)
    method = MInference(vertical=60, slash=110, block_size=16, min_length=0)
    base = bound(method).plan(call).mask()  # type: ignore[union-attr]
    for change in ({"softcap": 0.5}, {"scale": 0.01}):
        assert (bound(method).plan(AttentionCall(**{**vars(call), **change})).mask() != base).any()  # type: ignore[union-attr]


FILE = [{"0": [VS, 40, 104, 0.9], "2": [STREAM, 20, 50, 1.0]}, {}, {"3": [BLOCKS, 100, 0, 0.1]}]


def patterned(method: Any) -> BoundMInference:
    """MInference on a model with the layers of the file."""
    found = method.bind(replace(SMALL_MODEL, num_layers=len(FILE)))
    assert isinstance(found, BoundMInference)
    return found


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(FILE))
    return path


def test_a_file_gives_each_head_its_pattern(calibration: Path) -> None:
    method = patterned(MInference(calibration=str(calibration)))
    assert method.patterns(0, 4) == (Pattern(VS, 40, 104), MISSING, Pattern(STREAM, 20, 50), MISSING)
    assert method.patterns(1, 2) == (Pattern(VS, 1000, 6096),) * 2
    assert method.patterns(2, 4)[3].kind == BLOCKS
    call = make_call(300)
    plan = patterned(MInference(calibration=str(calibration), block_size=16, min_length=0)).plan(call)
    assert isinstance(plan, BlockPlan)
    assert plan.density()[0, [1, 3]].eq(1).all() and plan.density()[0, [0, 2]].max() < 1


def test_a_path_counts_from_the_folder_of_the_yaml(
    tmp_path: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "my.yaml").write_text("prefill: {method: minference, calibration: patterns.json}")
    monkeypatch.chdir(tmp_path / "work")
    config = load_config("../my.yaml")
    assert patterned(config.prefill).patterns(0, 1) == (Pattern(VS, 40, 104),)
    with pytest.raises(ConfigError, match=r"patterns\.json: cannot be read"):
        load_config({"prefill": {"method": "minference", "calibration": "patterns.json"}})
    absolute = load_config("minference.yaml", prefill={"calibration": str(calibration)})
    assert patterned(absolute.prefill).heads == patterned(config.prefill).heads


def test_the_fingerprint_follows_the_content_of_the_file(tmp_path: Path, calibration: Path) -> None:
    def fingerprint(path: Path) -> str:
        return load_config("minference", prefill={"calibration": str(path)}).fingerprint()

    before = fingerprint(calibration)
    moved = tmp_path / "moved.json"
    moved.write_text(calibration.read_text())
    assert fingerprint(moved) == before != load_config("minference").fingerprint()
    moved.write_text(json.dumps([{}] * 3))
    assert fingerprint(moved) != before


BAD_FILES = [
    ("{", 'is not JSON; run "sparse-patch calibrate minference'),
    ("3", "expected a list with a mapping of heads for each layer"),
    ("[[1]]", "expected a list with a mapping of heads for each layer"),
    ('[{"a": ["stream_llm", 1, 2, 3]}]', "layer 0: expected the index of a head, got 'a'"),
    ('[{"1": ["stream", 1, 2, 3]}]', "layer 0, head 1: expected one of the patterns vertical_and_slash, stream_llm,"),
    ('[{"1": [["x"], 1, 2, 3]}]', "layer 0, head 1: expected one of the patterns"),
    ('[{"1": ["stream_llm", -1, 2, 3]}]', "layer 0, head 1: expected two numbers of tokens, 0 or more, got [-1, 2]"),
    ('[{"1": ["stream_llm", 1]}]', "layer 0, head 1: expected [pattern, columns, diagonals, score]"),
    ('[{"1": "stream_llm"}]', "layer 0, head 1: expected [pattern, columns, diagonals, score]"),
    (f'[{{"1": ["stream_llm", 1, {10**30}]}}]', "layer 0, head 1: expected at most 2147483647 tokens, got 1000000000"),
    (f'[{{"1": ["stream_llm", {"9" * 5000}, 1]}}]', "layer 0, head 1: expected two numbers of tokens, 0 or more, got"),
    ('[{"1": ["stream_llm", -Infinity, 1]}]', "layer 0, head 1: expected two numbers of tokens, 0 or more, got [-inf"),
    ('[{"1": ["stream_llm", 1e3, 1]}]', "layer 0, head 1: expected two numbers of tokens, 0 or more, got [1000.0"),
    ('[{"1": ["stream_llm", 1, 2], "1": ["stream_llm", 3, 4]}]', "0.1: is set twice, in line 1; keep one of them"),
    ('[{"1": ["stream_llm", 1, 2], "01": ["stream_llm", 3, 4]}]', "layer 0: expected the index of a head, got '01'"),
    (f'[{{"{"1" * 99_999}": ["stream_llm", 1, 2]}}]', "layer 0: expected the index of a head, got '1111"),
    (f'[{{"1": ["{"x" * 99_999}", 1, 2]}}]', "layer 0, head 1: expected one of the patterns"),
]


@pytest.mark.parametrize("text, message", BAD_FILES, ids=[row[0][:40] for row in BAD_FILES])
def test_a_bad_file_is_one_line(calibration: Path, text: str, message: str) -> None:
    calibration.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config("minference", prefill={"calibration": str(calibration)})
    assert str(error.value).startswith(f"minference.yaml: prefill.calibration: {calibration}: {message}")
    assert str(error.value).isprintable() and len(str(error.value)) <= 490


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"method": "minference", "calibration": "no.json"}, "calibration: no.json: cannot be read: No such file"),
    ({"method": "minference", "calibration": 3}, "calibration: expected a valid string or null, got int 3"),
    ({"method": "minference", "vertical": -1}, "vertical: expected greater than or equal to 0, got int -1"),
    ({"method": "minference", "slash": -1}, "slash: expected greater than or equal to 0, got int -1"),
    ({"method": "minference", "block_size": 48}, "block_size: expected 16, 32, 64 or 128"),
    ({"method": "a_shape", "sink": -4}, "sink: expected greater than or equal to 0, got int -4"),
    ({"method": "a_shape", "window": 0}, "window: expected greater than or equal to 1, got int 0"),
    ({"method": "a_shape", "window": -4}, "window: expected greater than or equal to 1, got int -4"),
]


@pytest.mark.parametrize("settings, message", BAD_SETTINGS, ids=[row[1][:30] for row in BAD_SETTINGS])
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config({"prefill": settings})
    assert str(error.value).startswith(f"dict: prefill.{message}")


@pytest.mark.parametrize(
    "layers, message",
    [
        (FILE[:2], "was made for another model: num_layers 2, this one has 3"),
        ([*FILE[:2], {"4": [VS, 1, 2, 3]}], "layer 2 has a head 4, this one has heads 0 to 3"),
    ],
)
def test_a_file_of_another_model_is_refused(calibration: Path, layers: Any, message: str) -> None:
    calibration.write_text(json.dumps(layers))
    model = llama()
    with pytest.raises(ConfigError) as error:
        patch_model(model, "minference", prefill={"calibration": str(calibration)})
    assert str(error.value).startswith(f"minference.yaml: prefill.calibration: {calibration}")
    assert message in str(error.value) and not is_patched(model)


def test_a_model_runs_with_a_file(calibration: Path) -> None:
    model, ids = llama(), torch.randint(3, 90, (1, 240))
    settings = {"calibration": str(calibration), "block_size": 16, "block_budget": 64, "min_length": 0}
    with torch.no_grad(), patched(model, "minference", prefill=settings):
        assert model(ids).logits.isfinite().all()
        report = sparsity_report(model)
    assert report.fallbacks() == {}
    assert [layer.prefill.sparse_calls for layer in report.layers] == [1, 0, 1], "all heads of layer 1 keep everything"


def test_files_that_are_read_are_as_they_were_written(calibration: Path) -> None:
    assert read_patterns(calibration).layers[0] == {0: Pattern(VS, 40, 104), 2: Pattern(STREAM, 20, 50)}
