"""Write the README's tables from the JSON in `benchmarks/results/`.

Run `python benchmarks/update_readme.py` after new results; a test checks that the README is up to date.
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parent.parent


def demo_table() -> str:
    """One row for each run of `sparse-patch demo`."""
    runs = [json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("demo-*.json")]
    runs.sort(key=lambda run: run["length"])
    lines = [
        "| prompt tokens | dense finds | sparse finds | density | prefill, dense | prefill, sparse | speed-up |",
        "|---|---|---|---|---|---|---|",
        *(_demo_row(run) for run in runs),
        "",
        _demo_note(runs[0]),
    ]
    return "\n".join(lines)


def _demo_row(run: dict[str, Any]) -> str:
    dense, sparse, needles = run["dense"], run["sparse"], run["needles"]
    cells = [
        f"{run['length']:,}",
        f"{round(dense['exact_match'] * needles)} of {needles}",
        f"{round(sparse['exact_match'] * needles)} of {needles}",
        f"{sparse['density']:.2f}",
        f"{dense['prefill_s']:.1f} s",
        f"{sparse['prefill_s']:.1f} s",
        f"{run['speedup']:.2f} x",
    ]
    return f"| {' | '.join(cells)} |"


def _demo_note(run: dict[str, Any]) -> str:
    machine = run["machine"]
    return (
        f"`sparse-patch demo --length N` with `flexprefill.yaml` on needle-llama, {machine['device']}, "
        f"{machine['threads']} threads, float32, torch {machine['torch']}, transformers {machine['transformers']}; "
        f"medians of {run['repeats']}, dense is PyTorch's SDPA in the same run."
    )


COLUMNS = {  # title: tasks and figure
    "one needle": (("niah_single_1", "niah_single_2", "niah_single_3"), "exact_match"),
    "of 4 keys": (("niah_multikey_1",), "exact_match"),
    "among needles": (("niah_multikey_2",), "exact_match"),
    "4 values": (("niah_multivalue",), "token_accuracy"),
    "variables": (("vt",), "token_accuracy"),
    "recite": (("recite",), "token_accuracy"),
}


def accuracy_table() -> str:
    """One row for each length and configuration of `sparse-patch eval` on needle-llama."""
    result = json.loads((ROOT / "benchmarks" / "results" / "needle-llama.json").read_text())
    rows = result["rows"]
    lines = [
        f"| prompt tokens | config | {' | '.join(COLUMNS)} | density | prefill |",
        f"|{'---|' * (len(COLUMNS) + 4)}",
    ]
    for length in sorted({row["length"] for row in rows}):
        for config in result["configs"]:
            chosen = [row for row in rows if (row["length"], row["config"]) == (length, config)]
            if chosen:
                lines.append(_accuracy_row(length, config, chosen))
    return "\n".join([*lines, "", _accuracy_note(result)])


def _accuracy_row(length: int, config: str, rows: list[dict[str, Any]]) -> str:
    cells = [f"{length:,}", f"`{config}`"]
    for tasks, figure in COLUMNS.values():
        values = [row[figure] for row in rows if row["task"] in tasks]
        digits = 2 if figure == "exact_match" else 3
        cells.append(f"{fmean(values):.{digits}f}" if values else "")
    cells += [f"{fmean(row['density'] for row in rows):.2f}", f"{fmean(row['prefill_s'] for row in rows):.1f} s"]
    return f"| {' | '.join(cells)} |"


def _accuracy_note(result: dict[str, Any]) -> str:
    machine = result["machine"]
    samples: dict[int, set[int]] = {}
    for row in sorted(result["rows"], key=lambda row: row["length"]):
        samples.setdefault(row["length"], set()).add(row["samples"])
    prompts = ", ".join(f"{'/'.join(map(str, sorted(number)))} at {length:,}" for length, number in samples.items())
    return (
        "Share of prompts answered exactly (first three columns) and of answer tokens predicted (next three); density "
        f"and seconds are means over tasks. Prompts a task: {prompts}; so few that 1.00 of 10 means 0.72 or more, the "
        f"JSON has every interval. {machine['device']}, {machine['threads']} threads, float32, torch"
        f" {machine['torch']}, transformers {machine['transformers']}, "
        f"Python {machine['python']}, seed {result['seed']}."
    )


def updated(readme: str) -> str:
    """The README with fresh tables between its markers."""
    for name, table in (("demo", demo_table()), ("accuracy", accuracy_table())):
        begin, end = f"<!-- {name} table -->", f"<!-- end of {name} table -->"
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = f"{before}{begin}\n{table}\n{end}{after}"
    return readme


def main() -> None:
    """Rewrite README.md."""
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
