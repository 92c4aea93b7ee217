"""The rows of the whole-model benchmark: several runs in one file, and the README's table of them."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from builders.programs import program

from sparse_patch import TaskError
from sparse_patch.bench.model_rows import BEST, UNPATCHED, Mode, Row, added, against_dense
from sparse_patch.bench.model_timing import capture_seconds
from sparse_patch.report import GraphReport

HERE = Path("g.json")


def a_row(label: str = UNPATCHED, mode: Mode = "default", token_ms: float = 20.0, **others: Any) -> Row:
    fields = {"config": None if label in (UNPATCHED, BEST) else label, "length": 4096, "batch": 1, "chunk": None}
    times = {"first_token_s": 0.5, "token_ms": token_ms, "first_run_token_ms": 2 * token_ms}
    times |= {"slowest_token_ms": 60.0, "capture_s": None}
    memory = {"peak_memory_mb": 9.0, "decode_memory_mb": 8.0, "kv_mb": 7.0, "planned_mb": 6.0}
    return Row(label=label, mode=mode, **{**fields, **times, **memory, "fallbacks": {}, **others})  # type: ignore[arg-type]


def a_result(*rows: Row, **others: Any) -> dict[str, Any]:
    machine = {"device": "GPU X", "dtype": "bfloat16", "torch": "2.11", "triton": "3.6", "transformers": "5.17"}
    shape = {"layers": 32, "heads": {"heads": 32, "kv_heads": 8}}
    about = {"machine": machine, "weights": "random", "shape": shape, "new_tokens": 64}
    parts = {"configs": {}, "skipped": {}, "rows": [asdict(row) for row in rows]}
    return {**about, **parts, **others}


def test_times_are_relative_to_the_same_cache_argument() -> None:
    rows = against_dense(
        [
            *[a_row(), a_row(BEST, token_ms=10.0), a_row("delta", token_ms=5.0), a_row("delta", "eager", 30.0)],
            *[a_row(UNPATCHED, "static", 40.0), a_row("delta", "static", 4.0)],
        ]
    )
    assert [row.x_unpatched for row in rows] == [1, 0.5, 0.25, 1.5, 1, 0.1]
    assert [row.x_best for row in rows] == [2, 1, 0.5, None, None, None], "dense: best was timed in one mode"


def test_a_file_has_the_rows_of_several_runs_and_the_newest_of_each() -> None:
    old = a_result(a_row(batch=2), a_row("delta"), configs={"delta": {"a": 1}})
    new = a_result(
        a_row(token_ms=21.0),
        *[a_row(batch=8), a_row(length=32), a_row(mode="static"), a_row("quest"), a_row("delta", token_ms=30.0)],
        configs={"quest": {"a": 2}, "delta": {"a": 1}},
    )
    both = added(old, new, HERE)
    assert [(row["label"], row["mode"], row["batch"], row["length"], row["token_ms"]) for row in both["rows"]] == [
        (UNPATCHED, "default", 2, 4096, 20.0),
        (UNPATCHED, "default", 1, 4096, 21.0),
        (UNPATCHED, "default", 8, 4096, 20.0),
        (UNPATCHED, "default", 1, 32, 20.0),
        (UNPATCHED, "static", 1, 4096, 20.0),
        ("quest", "default", 1, 4096, 20.0),
        ("delta", "default", 1, 4096, 30.0),
    ]
    assert both["configs"] == {"delta": {"a": 1}, "quest": {"a": 2}} and both["machine"] == old["machine"]


@pytest.mark.parametrize("old_ms, new_ms", [(20.0, 25.0), (25.0, 20.0)])
def test_rows_of_several_runs_are_relative_to_the_fastest_unpatched_run(old_ms: float, new_ms: float) -> None:
    """A slow host must not make a patch look fast."""
    old = a_result(*against_dense([a_row(token_ms=old_ms), a_row("delta", token_ms=10.0)]))
    new = a_result(*against_dense([a_row(token_ms=new_ms), a_row("delta", "eager", 40.0), a_row("quest", "static")]))
    rows = {(row["label"], row["mode"]): row for row in added(old, new, HERE)["rows"]}
    assert rows[UNPATCHED, "default"]["token_ms"] == 20.0
    found = {key: row["x_unpatched"] for key, row in rows.items()}
    assert found == {
        **{(UNPATCHED, "default"): 1.0, ("delta", "default"): 0.5},
        **{("delta", "eager"): 2.0, ("quest", "static"): None},
    }


def test_our_own_dense_decode_may_be_of_another_run_than_a_method() -> None:
    old = a_result(*against_dense([a_row(BEST, token_ms=10.0), a_row("delta", token_ms=5.0)]))
    new = a_result(*against_dense([a_row(BEST, token_ms=8.0), a_row("quest", token_ms=6.0), a_row("moa", "static")]))
    for first, second in ((old, new), (new, old)):
        found = {row["label"]: row["x_best"] for row in added(first, second, HERE)["rows"]}
        assert found == {BEST: 1.0, "delta": 0.5, "quest": 0.75, "moa": None}
    alone = a_result(*against_dense([a_row("delta", token_ms=4.0)]))
    assert {row["label"]: row["x_best"] for row in added(new, alone, HERE)["rows"]}["delta"] == 0.5


def test_what_was_skipped_is_replaced_by_what_ran_and_the_other_way_round() -> None:
    skipped = {f"{BEST}, default, batch 1: out of memory": [64, 128]}
    old = a_result(a_row(), a_row(length=64), skipped=skipped)
    ran = a_result(a_row(BEST, length=128), skipped={f"{BEST}, default, batch 1: out of memory": [32]})
    assert added(old, ran, HERE)["skipped"] == {f"{BEST}, default, batch 1: out of memory": [32, 64]}
    assert added(old, a_result(a_row(BEST, length=128), a_row(BEST, length=64)), HERE)["skipped"] == {}
    both = added(old, a_result(skipped={f"{UNPATCHED}, default, batch 1: out of memory": [64]}), HERE)
    assert [row["length"] for row in both["rows"]] == [4096]
    assert both["skipped"] == {**skipped, f"{UNPATCHED}, default, batch 1: out of memory": [64]}


def test_runs_that_differ_are_refused() -> None:
    old = a_result(configs={"delta": {"a": 1}})
    with pytest.raises(
        TaskError, match=r"^g.json: --add: has weights 'random', this run has 'mine'; write another file$"
    ):
        added(old, a_result(weights="mine"), HERE)
    with pytest.raises(TaskError, match=r"^g.json: --add: has machine "):
        added(old, a_result(machine={"device": "GPU Y"}), HERE)
    with pytest.raises(TaskError, match=r"^g.json: --add: 'delta' was another configuration there; rename this one$"):
        added(old, a_result(configs={"delta": {"a": 2}}), HERE)


def test_the_seconds_of_a_capture_are_those_of_the_report() -> None:
    report: Any = SimpleNamespace(graphs=GraphReport(captures=1, capture_s=0.5))
    assert capture_seconds(report) == 0.5
    report.graphs = GraphReport()
    assert capture_seconds(report) is None


def test_the_readme_shows_every_row_as_what_the_user_types(tmp_path: Path) -> None:
    rows = [
        a_row(batch=8, x_unpatched=1.0),
        a_row(x_unpatched=1.0),
        a_row(BEST, token_ms=9.126, x_unpatched=0.456, capture_s=0.514, length=131072),
        a_row("delta", "eager", 40.0, x_unpatched=2.0),
        a_row("delta", "static", 8.0),
    ]
    result = a_result(*rows, skipped={"delta, default, batch 8: out of memory": [131072]})
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "generate.json").write_text(json.dumps(result))
    (tmp_path / "one" / "decode.json").write_text("not read")
    drawn = program("update_readme").decode_tables(tmp_path)
    assert drawn.splitlines()[:7] == [
        "| what the user types | prompt tokens | batch | first token s | ms a token | x unpatched |",
        "|---|---|---|---|---|---|",
        "| `generate(**inputs)` | 4,096 | 1 | 0.50 | 20.00 | 1.00 |",
        '| `patch_model(model, "delta.yaml", decode_graph="off")`, `generate(**inputs)` '
        "| 4,096 | 1 | 0.50 | 40.00 | 2.00 |",
        '| `patch_model(model, "delta.yaml")`, `generate(**inputs, cache_implementation="static")` '
        "| 4,096 | 1 | 0.50 | 8.00 |  |",
        '| `patch_model(model, "dense.yaml", dense="best")`, `generate(**inputs)` | 131,072 | 1 | 0.50 | 9.13 | 0.46 |',
        "| `generate(**inputs)` | 4,096 | 8 | 0.50 | 20.00 | 1.00 |",
    ]
    assert "up to 0.51 s" in drawn and "GPU X, bfloat16, 32 layers" in drawn
    assert "Not run at 131,072 tokens: delta, default, batch 8: out of memory." in drawn


def test_a_gpu_without_such_a_file_keeps_the_table_of_kernels(tmp_path: Path) -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "h200"
    for folder, names in {"a": ["decode.json"], "b": ["generate.json", "decode.json"]}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            source = json.dumps(a_result(a_row())) if name == "generate.json" else (results / name).read_text()
            (tmp_path / folder / name).write_text(source)
    drawn = program("update_readme").decode_tables(tmp_path)
    assert drawn.count("| decode |") == 1 and drawn.count("| what the user types |") == 1
    assert drawn.index("| what the user types |") < drawn.index("| decode |")


def test_the_readme_shows_the_machine_with_the_most_rows_and_links_to_the_others(tmp_path: Path) -> None:
    for name, rows in {"small": [a_row()], "large": [a_row("delta", token_ms=7.25), a_row()], "none": []}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "generate.json").write_text(json.dumps(a_result(*rows)))
    drawn = program("update_readme").decode_tables(tmp_path)
    assert drawn.count("| what the user types |") == 1 and drawn.index("20.00") < drawn.index("7.25")
    links = [f"[{name}](benchmarks/results/{name}/generate.json)" for name in ("small", "none")]
    assert drawn.endswith(f"The same on other machines: {', '.join(links)}.")
