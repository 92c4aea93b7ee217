"""Write the README's tables from the JSON in `benchmarks/results/`.

Run `python benchmarks/update_readme.py` after new results; a test checks that the README is up to date.
"""

import json
from pathlib import Path
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


def updated(readme: str) -> str:
    """The README with fresh tables between its markers."""
    begin, end = "<!-- demo table -->", "<!-- end of demo table -->"
    before, _, rest = readme.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{demo_table()}\n{end}{after}"


def main() -> None:
    """Rewrite README.md."""
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
