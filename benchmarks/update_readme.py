"""Write the README's tables from the JSON in `benchmarks/results/`.

Run `python benchmarks/update_readme.py` after new results. A test checks that the README is up to date.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from sparse_patch.errors import said_in_one_line
from sparse_patch.files.writing import write_file

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


COLUMNS = {  # title -> tasks and figure
    "one needle": (("niah_single_1", "niah_single_2", "niah_single_3"), "exact_match"),
    "of 4 keys": (("niah_multikey_1",), "exact_match"),
    "among needles": (("niah_multikey_2",), "exact_match"),
    "4 values": (("niah_multivalue",), "token_accuracy"),
    "variables": (("vt",), "token_accuracy"),
    "recite": (("recite",), "token_accuracy"),
}


def accuracy_tables(name: str = "needle-llama", results: Path = ROOT / "benchmarks" / "results") -> str:
    """One table for each machine that `sparse-patch eval` ran on: the CPU first, then `<machine>/<name>.json`."""
    paths = [results / f"{name}.json", *sorted(results.glob(f"*/{name}.json"))]
    return "\n\n".join(accuracy_table(json.loads(path.read_text())) for path in paths)


def accuracy_table(result: dict[str, Any]) -> str:
    """One row for each length and configuration of `sparse-patch eval`, without columns that never change."""
    rows = result["rows"]
    tasks = {row["task"] for row in rows}
    columns = {title: column for title, column in COLUMNS.items() if tasks & set(column[0])}
    figures = {title: figure for title, figure in FIGURES.items() if len({figure(row) for row in rows}) > 1}
    if result.get("processes", 1) > 1:
        figures.pop("prefill")
    titles = ["prompt tokens", "config", *columns, *figures]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for length in sorted({row["length"] for row in rows}):
        for config in result["configs"]:
            chosen = [row for row in rows if (row["length"], row["config"]) == (length, config)]
            if chosen:
                cells = [_task_cell(chosen, *column) for column in columns.values()]
                cells += [_figure_cell(chosen, title, figure) for title, figure in figures.items()]
                lines.append(f"| {' | '.join([f'{length:,}', f'`{config}`', *cells])} |")
    return "\n".join([*lines, "", _accuracy_note(result)])


def _attended(row: dict[str, Any]) -> float | None:
    return None if row["attended"] is None else float(row["attended"]) / float(row["length"])


FIGURES: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "density": lambda row: row["density"],
    "attended": _attended,
    "prefill": lambda row: row["prefill_s"],
}


def _task_cell(rows: list[dict[str, Any]], tasks: tuple[str, ...], figure: str) -> str:
    values = [row[figure] for row in rows if row["task"] in tasks]
    return f"{fmean(values):.{2 if figure == 'exact_match' else 3}f}" if values else ""


def _figure_cell(rows: list[dict[str, Any]], title: str, figure: Callable[[dict[str, Any]], float | None]) -> str:
    values = [value for value in map(figure, rows) if value is not None]
    return "" if not values else f"{fmean(values):.1f} s" if title == "prefill" else f"{fmean(values):.2f}"


def _accuracy_note(result: dict[str, Any]) -> str:
    machine = result["machine"]
    samples: dict[int, set[int]] = {}
    for row in sorted(result["rows"], key=lambda row: row["length"]):
        samples.setdefault(row["length"], set()).add(row["samples"])
    dtype = "bfloat16" if "+cu" in machine["torch"] else "float32"  # as in load_model
    prompts = ", ".join(f"{'/'.join(map(str, sorted(number)))} at {length:,}" for length, number in samples.items())
    return (
        "Needles and keys: share of prompts answered exactly. 4 values, variables, recite: share of answer tokens "
        "predicted. Density is that of prefill, attended the keys that a decoded token attended to, as a share of the "
        f"prompt, mean over layers. Prompts a task: {prompts}; so few that 1.00 of 10 means 0.72 or more, the "
        f"JSON has every interval. {_shared(result)}{machine['device']}, {machine['threads']} threads, {dtype}, torch"
        f" {machine['torch']}, transformers {machine['transformers']}, "
        f"Python {machine['python']}, seed {result['seed']}."
    )


def _shared(result: dict[str, Any]) -> str:
    number = result.get("processes", 1)
    return f"{number} processes shared the machine, so no seconds. " if number > 1 else ""


def prefill_tables(results: Path = ROOT / "benchmarks" / "results") -> str:
    """One table for each machine of `sparse-patch bench prefill`, from `<machine>/prefill.json`."""
    tables = [prefill_table(json.loads(path.read_text())) for path in sorted(results.glob("*/prefill.json"))]
    return "\n\n".join(tables) or "No measured machine is recorded yet; the command measures yours."


def prefill_table(result: dict[str, Any]) -> str:
    """One row for each kernel, density and method, one column for each length."""
    rows = result["rows"]
    lengths = sorted({row["length"] for row in rows})
    lines = [
        f"| attention of one layer | {' | '.join(f'{n:,} tokens' for n in lengths)} |",
        f"|{'---|' * (len(lengths) + 1)}",
    ]
    for label in dict.fromkeys(_prefill_label(row) for row in sorted(rows, key=lambda row: KINDS.index(row["kind"]))):
        mine = {row["length"]: row for row in rows if _prefill_label(row) == label}
        lines.append(f"| {label} | {' | '.join(_prefill_cell(mine.get(length)) for length in lengths)} |")
    return "\n".join([*lines, "", _prefill_note(result)])


KINDS = ("dense", "blocks", "method")


def _prefill_label(row: dict[str, Any]) -> str:
    """The label of a row. A method has one line, whichever kernels it ran on."""
    return f"`{row['config']}`" if row["config"] else row["label"]


def _prefill_cell(row: dict[str, Any] | None) -> str:
    """Total milliseconds and speed-up over the fastest dense kernel; for a method its density too."""
    if row is None:
        return ""
    ms = row["total_ms"]
    time = f"{ms:.2f} ms" if ms < 10 else f"{ms:.1f} ms"
    speedup = "" if row["speedup"] is None else f", {row['speedup']:.2f} x"
    return time + speedup + (f" (density {row['density']:.2f})" if row["kind"] == "method" else "")


def _prefill_note(result: dict[str, Any]) -> str:
    machine = result["machine"]
    shape = machine["shape"]
    return (
        "Milliseconds, selection included, and speed-up over the fastest dense kernel of the same run. "
        f"{machine['device']}, {machine['dtype']}, {shape['heads']} query heads, {shape['kv_heads']} KV heads, "
        f"head_dim {shape['head_dim']}, {_versions(machine)}. Percentages are random blocks of 128; {result['qkv']}."
    )


def _versions(machine: dict[str, Any]) -> str:
    """The versions that a time depends on, of what the machine has."""
    names = ("driver", "torch", "triton", "flash-attn-4", "transformers")
    return ", ".join(f"{name} {machine[name]}" for name in names if name in machine)


def decode_tables(results: Path = ROOT / "benchmarks" / "results") -> str:
    """The table of `bench model`, of the machine with the most rows in `<machine>/generate.json`, and links to others.

    Machines without that file have a table of `bench decode`.
    """
    timed = sorted(results.glob("*/generate.json"), key=lambda path: -len(json.loads(path.read_text())["rows"]))
    others = {path.parent for path in results.glob("*/decode*.json")} - {path.parent for path in timed}
    tables = [generate_table(json.loads(path.read_text())) for path in timed[:1]]
    links = [f"[{path.parent.name}](benchmarks/results/{path.parent.name}/generate.json)" for path in timed[1:]]
    tables += [f"The same on other machines: {', '.join(links)}."] * bool(links)
    return "\n\n".join(tables + list(map(decode_table, sorted(others)))) or "No measured machine is recorded yet."


def generate_table(result: dict[str, Any]) -> str:
    """One row for each row of `sparse-patch bench model`, whichever way it turned out."""
    titles = ["what the user types", "prompt tokens", "batch", "first token s", "ms a token", "x unpatched"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in sorted(result["rows"], key=lambda row: (row["batch"], row["length"], row["label"] != "unpatched")):
        cells = [
            _typed(row),
            f"{row['length']:,}",
            str(row["batch"]),
            f"{row['first_token_s']:.2f}",
            f"{row['token_ms']:.2f}",
            "" if row["x_unpatched"] is None else f"{row['x_unpatched']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _generate_note(result)])


def _typed(row: dict[str, Any]) -> str:
    """The code that a row timed."""
    config = f'"{row["config"]}.yaml"' if row["config"] else '"dense.yaml", dense="best"'
    graph = ', decode_graph="off"' if row["mode"] == "eager" else ""
    cache = ', cache_implementation="static"' if row["mode"] == "static" else ""
    patch = [] if row["label"] == "unpatched" else [f"`patch_model(model, {config}{graph})`"]
    return ", ".join([*patch, f"`generate(**inputs{cache})`"])


def _generate_note(result: dict[str, Any]) -> str:
    machine, shape = result["machine"], result["shape"]
    captures = [row["capture_s"] for row in result["rows"] if row["capture_s"] is not None]
    capture = f"The capture of a step's graph took up to {max(captures):.2f} s. " if captures else ""
    skipped = "".join(
        f"Not run at {', '.join(f'{length:,}' for length in lengths)} tokens: {what}. "
        for what, lengths in result["skipped"].items()
    )
    return (
        "The second of two runs; ms a token is the median of those after the first. x unpatched is the time of a token "
        "relative to the fastest run of the unpatched model with the same cache argument, so more than 1 is slower. "
        f"{capture}{skipped}"
        f"Weights: {result['weights']}. {machine['device']}, {machine['dtype']}, {shape['layers']} layers, "
        f"{shape['heads']['heads']} query heads, {shape['heads']['kv_heads']} KV heads, {_versions(machine)}."
    )


def decode_table(folder: Path) -> str:
    """A row for each kind of layer and for all layers, then the whole models; a column for each batch and length."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("decode*.json"))]
    models = [json.loads(path.read_text()) for path in sorted(folder.glob("model*.json"))]
    cells: dict[str, dict[tuple[int, int], str]] = {}
    for run in runs:
        for row in run["rows"]:
            of = {(run["batch"], row["length"]): _decode_cell(row["ms"], row["dense"])}
            cells.setdefault(_decode_label(row), {}).update(of)
    for run in models:
        for row in run["rows"]:
            label = f"a token of the whole model: {_decode_label(row)}"
            cells.setdefault(label, {})[run["batch"], row["length"]] = _decode_cell(row["token_ms"], row["best"])
    columns = sorted({key for row in cells.values() for key in row})
    titles = [f"batch {batch}, {length:,} tokens" for batch, length in columns]
    lines = [f"| decode | {' | '.join(titles)} |", f"|{'---|' * (len(columns) + 1)}"]
    lines += [f"| {label} | {' | '.join(row.get(key, '') for key in columns)} |" for label, row in cells.items()]
    machine, heads = runs[0]["machine"], runs[0]["shape"]["heads"]
    return "\n".join(
        [
            *lines,
            "",
            "One step, and its time relative to dense decode on our own kernel, on the same cache. Layers are timed in "
            f"one CUDA graph of {runs[0]['shape']['layers']}; whole models generate with a static cache, compiled, "
            f"with random weights. {machine['device']}, {machine['dtype']}, {heads['heads']} query heads, "
            f"{heads['kv_heads']} KV heads, head_dim {heads['head_dim']}; a copy moves "
            f"{max(run['copy_gb_per_s'] for run in runs):,.0f} GB/s; torch {machine['torch']}, triton "
            f"{machine['triton']}, transformers {machine['transformers']}.",
        ]
    )


def _decode_label(row: dict[str, Any]) -> str:
    name, _, rest = row["label"].partition(":")
    return f"`{name}`{':' if rest else ''}{rest}" if row["config"] else row["label"]


def _decode_cell(ms: float, dense: float | None) -> str:
    time = f"{1000 * ms:.1f} us" if ms < 1 else f"{ms:.2f} ms"
    return time + ("" if dense is None else f", {dense:.2f} x")


def updated(readme: str) -> str:
    """The README with new tables between its markers."""
    tables = {
        "demo": demo_table,
        "accuracy": accuracy_tables,
        "prefill": prefill_tables,
        "decode accuracy": partial(accuracy_tables, "needle-decode"),
        "decode": decode_tables,
    }
    for name, draw in tables.items():
        begin, end = f"<!-- {name} table -->", f"<!-- end of {name} table -->"
        before, _, rest = readme.partition(begin)
        _, _, after = rest.partition(end)
        readme = f"{before}{begin}\n{draw()}\n{end}{after}"
    return readme


def main() -> None:
    """Rewrite README.md."""
    path = ROOT / "README.md"
    write_file(path, updated(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    with said_in_one_line():
        main()
