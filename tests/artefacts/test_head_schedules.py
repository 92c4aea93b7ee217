"""Head schedules: the rule, the file, and the published files of others."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from sparse_patch.artefacts.base import Header, check_shape
from sparse_patch.artefacts.head_schedules import (
    PUBLISHED_LENGTHS,
    HeadSchedules,
    duo_schedules,
    read_head_schedules,
    schedules_of_duo,
    schedules_of_moa,
    write_head_schedules,
)
from sparse_patch.model_shape import ModelShape
from sparse_patch.plans import GrowingWindow

SHAPE = ModelShape("llama", num_layers=2, num_heads=4, num_kv_heads=2, hidden_size=64)
HEADER = Header.of("moa", SHAPE, {"lengths": [2048]}, "tiny")
RULES = HeadSchedules.of(SHAPE, [[0, 1024], [-1024, 320]], [[0.5, 0], [1, 0]], header=HEADER)


def visible(rules: HeadSchedules, layer: int, head: int, length: int) -> int:
    """Keys that the last query of `length` tokens reads, counted one by one."""
    sinks, windows = rules.spans(layer, length)
    last, window = length - 1, windows[head]
    assert isinstance(window, int)
    return sum(j < sinks[head] or last - j < window for j in range(length))


def test_the_rule_as_the_public_code_computes_it() -> None:
    """Section 1.1: c = trunc(alpha + beta M), c = min(c, M), C = 64 ceil(max(c, 128) / 64), window = C - 64."""
    for length in (1, 64, 100, 129, 2048, 2049, 5000):
        for layer, (alphas, betas) in enumerate(zip(RULES.alphas, RULES.betas, strict=True)):
            sinks, windows = RULES.spans(layer, length)
            assert sinks == [64, 64]
            for alpha, beta, window in zip(alphas, betas, windows, strict=True):
                c = min(int(alpha + beta * length), length)
                assert window == 64 * math.ceil(max(c, 128) / 64) - 64
    assert RULES.spans(0, 2048) == ([64, 64], [960, 960]) and RULES.spans(1, 2048) == ([64, 64], [960, 256])
    assert RULES.spans(1, 1025)[1] == [64, 256], "a span of one token is the shortest span"


def test_density_and_bytes_are_those_of_the_mask() -> None:
    for length in (100, 300, 2048, 4096):
        counted = [visible(RULES, layer, head, length) / length for layer in range(2) for head in range(2)]
        assert RULES.density(length) == pytest.approx(sum(counted) / 4)
    assert RULES.density(2048, [1]) == pytest.approx((1024 + 320) / 4096)


def test_a_full_head_reads_everything() -> None:
    full = HeadSchedules.of(SHAPE, [[0, 0]] * 2, [[1, 1]] * 2)
    for length in (1, 63, 64, 65, 127, 1000):
        assert visible(full, 0, 0, length) == length and full.density(length) == 1


def test_a_current_window_never_moves_back() -> None:
    rules = RULES.model_copy(update={"length_policy": "current"})
    for layer in range(2):
        for head in range(2):
            window = rules.spans(layer, 2048)[1][head]
            assert isinstance(window, GrowingWindow)
            first = [i + 1 - window.at(i) for i in range(3000)]
            assert all(after >= before for before, after in pairwise(first))
    first_head, second_head = rules.spans(0, 2001)[1]
    assert isinstance(first_head, GrowingWindow) and isinstance(second_head, GrowingWindow)
    assert [(first_head.at(i), second_head.at(i)) for i in (0, 999, 2000, 9999)] == [
        (64, 1024 - 64), (500 - 64, 1024 - 64), (1000 - 64, 1024 - 64), (1000 - 64, 1024 - 64)
    ]  # fmt: skip
    assert rules.kept(0, 2001) == [1000, 1024]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_head_schedules(path, RULES)
    assert read_head_schedules(path) == RULES and [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert json.loads(path.read_text())["artefact"] == HEADER.entry()["artefact"]
    assert len(path.read_text().splitlines()) == 2 + len(HeadSchedules.model_fields) + 2 * (2 + 1), "a layer in a line"
    check_shape(RULES.header, SHAPE, "here")


GOOD = {  # of an earlier version, without a header
    **{"format": "per-head-span/1", "model_type": "llama", "num_layers": 2, "num_query_heads": 4, "num_kv_heads": 2},
    **RULES.model_dump(exclude={"header", "measured"}),
    "provenance": {"lengths": [2048], "sparse_patch": "0.1.0"},
}
NEW = {**HEADER.entry(), **RULES.model_dump(exclude={"header"})}


def said(**changes: Any) -> dict[str, Any]:
    """A header with changes."""
    return {"artefact": {**NEW["artefact"], **changes}}


BAD: list[tuple[Any, str]] = [
    ("{", "is not JSON"),
    ([], "expected a JSON object, got list"),
    ({**GOOD, "format": "per-head-span/2"}, "format: expected 'per-head-span/1', got 'per-head-span/2'"),
    ({key: value for key, value in GOOD.items() if key != "format"}, "artefact: missing; run"),
    ({key: value for key, value in GOOD.items() if key != "betas"}, "betas: missing"),
    ({**GOOD, "alpha": 1}, "alpha: unknown key; known keys: format, model_type"),
    ({**GOOD, "granularity": "query_head"}, "granularity: expected 'kv_head', got 'query_head'"),
    ({**GOOD, "sink": 128}, "min_span: expected more than the 128 tokens of sink, got 128"),
    ({**GOOD, "num_kv_heads": 3}, "num_kv_heads: 3 do not divide 4 query heads"),
    ({**GOOD, "alphas": [[0, 1]]}, "alphas: expected 2 layers, got 1"),
    ({**GOOD, "alphas": [[0, 1], [0]]}, "alphas: layer 1: expected 2 heads, got 1"),
    ({**GOOD, "alphas": [[0, "x"], [0, 1]]}, "alphas.0.1: expected a valid number, got 'x'"),
    ({**GOOD, "betas": [[0, 1], [1.5, 0]]}, "betas.1.0: expected less than or equal to 1, got '1.5'"),
    ({**GOOD, "block": 0}, "block: expected greater than or equal to 1, got '0'"),
    ({**GOOD, "block": 10**30}, "block: expected less than or equal to 2147483647, got '1000000"),
    ({**GOOD, "sink": 2**31}, "sink: expected less than or equal to 2147483647, got '2147483648'"),
    ({**GOOD, "alphas": [[0, 1e14], [0, 1]]}, "alphas.0.1: expected less than or equal to 2147483647, got '1000000"),
    ({**GOOD, "alphas": [[0, -math.inf], [0, 1]]}, "alphas.0.1: expected "),
    ({**GOOD, "betas": [[0, math.nan], [0, 1]]}, "betas.0.1: expected "),
    ({**GOOD, "model_type": "x" * 100_000, "betas": 1}, "betas: expected a valid list, got '1'"),
    ({**GOOD, "a\nb": 1}, r"a\nb: unknown key; known keys: format"),
    ({**GOOD, "x" * 100_000: 1}, "xxx"),
    ({**NEW, "alpha": 1}, "alpha: unknown key; known keys: granularity, sink"),
    ({**NEW, "header": 1}, "header: unknown key; known keys: granularity, sink"),
    ({**NEW, "format": "per-head-span/1"}, "format: unknown key; known keys: granularity"),
    ({**NEW, "betas": [[0, 1]]}, "betas: expected 2 layers, got 1"),
    ({**NEW, "artefact": 3}, "artefact: expected a mapping of kind, version, model, settings, made_by, got '3'"),
    ({**NEW, **said(kind="sale")}, "artefact.kind: expected 'moa', got 'sale'"),
    ({**NEW, **said(version=2)}, "artefact.version: expected 1, got '2'"),
    ({**NEW, **said(model={"num_layers": 2})}, "artefact.model.model_type: missing"),
    ({**NEW, **said(model={"num_layers": 0})}, "artefact.model.num_layers: expected greater than or equal to 1"),
    (json.dumps(GOOD).replace('"sink"', '"sink": 4, "sink"'), "sink: is set twice, in line 1; keep one of them"),
]


@pytest.mark.parametrize("data, message", BAD, ids=[message[:40] for _, message in BAD])
def test_a_wrong_file_is_one_line(data: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(ValueError) as error:
        read_head_schedules(path)
    text = str(error.value)
    assert text.startswith(f"calibration: {path}: {message}") and text.isprintable() and len(text) <= 490
    assert "sparse-patch calibrate moa" in text


def test_a_file_that_is_not_there_and_another_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"calibration: .*no\.json: cannot be read: No such file"):
        read_head_schedules(tmp_path / "no.json")
    other = ModelShape("llama", num_layers=3, num_heads=4, num_kv_heads=2, hidden_size=64)
    with pytest.raises(ValueError, match="calibration: p: was made for another model: num_layers 2, this one has 3"):
        check_shape(RULES.header, other, "calibration: p")


def test_a_published_plan_of_moa(tmp_path: Path) -> None:
    """Every KV head keeps what each query head of its group keeps: heads q // group, as Transformers repeats them."""
    alphas = [[0, 2048, 0, 0], [-1024, 1024, 512, 512]]
    betas = [[0.5, 0.25, 1, 0], [1, 0.5, 0.125, 0.125]]
    path = tmp_path / "moa.json"
    path.write_text(json.dumps({"alphas": alphas, "betas": betas}))
    plan, remark = schedules_of_moa(path, SHAPE)
    for length in range(PUBLISHED_LENGTHS[0], PUBLISHED_LENGTHS[1] + 1, 64):
        for layer in range(2):
            kept = plan.kept(layer, length)
            for head in range(4):
                assert kept[head // 2] >= plan.room(alphas[layer][head], betas[layer][head], length)
    assert (plan.alphas[0][1], plan.betas[0][1]) == (0, 1) and (plan.alphas[1][1], plan.betas[1][1]) == (512, 0.125)
    assert f"density {plan.density(16384):.2f} at 16384 tokens" in remark and "4 heads as rules of 2 KV heads" in remark
    write_head_schedules(tmp_path / "plan.json", plan)
    assert read_head_schedules(tmp_path / "plan.json") == plan
    heads = ModelShape("llama", num_layers=2, num_heads=4, num_kv_heads=4, hidden_size=64)
    same, _ = schedules_of_moa(path, heads)
    assert same.alphas == alphas and same.betas == betas


@pytest.mark.parametrize(
    "data, message",
    [
        ({"alphas": [[0] * 4] * 2}, "expected only alphas and betas, as MoA publishes them, got alphas"),
        ({"alphas": [[0] * 3] * 2, "betas": [[1] * 3] * 2}, "alphas: layer 0: expected 4 heads, got 3"),
        (
            {"alphas": [[0] * 4] * 2, "betas": [[1] * 4]},
            "betas: expected 2 layers, got 1; it was made for another model; run",
        ),
        ({"alphas": [[0] * 4] * 2, "betas": 1}, "betas: expected 2 lists of 4 numbers, got '1'"),
        ({"alphas": [[0] * 4] * 2, "betas": [[2] * 4] * 2}, "betas.0.0: expected less than or equal to 1, got '2.0'"),
        ({"alphas": [[1e14] * 4] * 2, "betas": [[1] * 4] * 2}, "alphas: "),
        ({"alphas": [[10**400] * 4] * 2, "betas": [[1] * 4] * 2}, "alphas: "),
        ({"alphas": [[-math.inf] * 4] * 2, "betas": [[1] * 4] * 2}, "alphas: "),
    ],
)
def test_a_wrong_plan_of_moa(data: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "moa.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError) as error:
        schedules_of_moa(path, SHAPE)
    assert str(error.value).startswith(f"calibration: {path}: {message}") and "\n" not in str(error.value)


def test_a_published_pattern_of_duoattention(tmp_path: Path) -> None:
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("0.9\t-0.001\n0.5\t0.5\n")

    def full(sparsity: float) -> list[list[float]]:
        return schedules_of_duo(path, SHAPE, sparsity)[0].betas

    assert full(0) == [[1, 1], [1, 1]] and full(1) == [[0, 0], [0, 0]]
    assert full(0.3) == [[1, 0], [1, 1]] and full(0.6) == [[1, 0], [1, 0]], "of equal gates the first"
    plan, remark = schedules_of_duo(path, SHAPE, 0.6, sink=128, recent=256)
    assert plan.spans(0, 4096) == ([128, 128], [4096 - 128, 256]) and "2 of 4 KV heads are full" in remark
    path.write_text("0\t-3\n-1\t0\n")
    assert full(0.5) == [[1, 1], [0, 0]], "negative gates are as good as 0"
    assert duo_schedules(SHAPE, {(0, 1)}).spans(0, 1024) == ([64, 64], [256, 960])


@pytest.mark.parametrize(
    "text, sparsity, message",
    [
        ("0.1\tx\n0.2\t0.3", 0.5, "expected a line of numbers for each layer with tabs between: could not convert"),
        ("0.1\t-Infinity\n0\t0", 0.5, "with tabs between: -Infinity is not finite"),
        ("0.1\t1e999\n0\t0", 0.5, "with tabs between: 1e999 is not finite"),
        (f"0.1\t{'x' * 100_000}\n0\t0", 0.5, "with tabs between: "),
        ("0.1\tnan\n0\t0", 0.5, "with tabs between: nan is not finite"),
        ("0.1\t0.2", 0.5, "expected 2 layers, got 1; it was made for another model; run"),
        ("0.1\t0.2\n0.1", 0.5, "layer 1: expected 2 heads, got 1"),
        ("0.1\t0.2\n0.1\t0.2", 1.5, "sparsity: expected a share from 0 to 1, got 1.5"),
    ],
)
def test_a_wrong_pattern_of_duoattention(text: str, sparsity: float, message: str, tmp_path: Path) -> None:
    path = tmp_path / "heads.tsv"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        schedules_of_duo(path, SHAPE, sparsity)
    assert message in str(error.value) and str(error.value).isprintable() and len(str(error.value)) <= 490
