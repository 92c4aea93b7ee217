"""The rows of `bench model`: what a user types, what was measured, and the rows of several runs in one file."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sparse_patch.workbench.adding import check_same_run

Mode = Literal["default", "eager", "static"]
UNPATCHED, BEST = "unpatched", "dense: best"


@dataclass(frozen=True)
class Row:
    """The measurements of one variant at one length.

    Attributes:
        label: the variant's name in tables.
        config: name of the configuration; None for the dense variants.
        length: tokens of the prompt.
        batch: number of rows of the prompt.
        mode: what the user types: "default" (no cache argument), "eager" (the same on a model that is patched with
            `decode_graph: off`) or "static" (`cache_implementation="static"`, which a GPU compiles).
        chunk: prompt tokens per forward; None if one forward takes the whole prompt.
        first_token_s: seconds from the call of `generate` to the first token.
        token_ms: median milliseconds per token after the first.
        first_run_token_ms: the same of the first run at this length, in which kernels are compiled. On Hopper, PyTorch
            (2.11) gives one query to cuDNN, which prepares itself anew for every number of keys, for a millisecond or
            more a layer. A user who generates once pays for that in every token.
        slowest_token_ms: longest time of a token after the first.
        capture_s: seconds that the capture of the decode step's graph took; None without a capture.
        peak_memory_mb: peak allocated memory, weights included, in MB of 2^20 bytes; None on a CPU.
        decode_memory_mb: the same after the first token.
        kv_mb: memory of the cache's keys and values.
        planned_mb: the part of `kv_mb` that the method's spans need; all of it without spans.
        fallbacks: reason -> number of calls that a method could not serve.
        x_unpatched: `token_ms` divided by that of the unpatched model with the same cache argument; in a file of
            several runs by the fastest of them, because the host of a GPU is not equally fast in every run.
        x_best: `token_ms` divided by that of our own dense decode in the same mode.
    """

    label: str
    config: str | None
    length: int
    batch: int
    mode: Mode
    chunk: int | None
    first_token_s: float
    token_ms: float
    first_run_token_ms: float
    slowest_token_ms: float
    capture_s: float | None
    peak_memory_mb: float | None
    decode_memory_mb: float | None
    kv_mb: float
    planned_mb: float
    fallbacks: dict[str, int]
    x_unpatched: float | None = None
    x_best: float | None = None


def without_patch(mode: Mode) -> Mode:
    """The mode of the unpatched model beside a patched one."""
    return "static" if mode == "static" else "default"


def name_of(label: str, mode: str, batch: int) -> str:
    """What tells the rows of one length apart, in words."""
    return f"{label}, {mode}, batch {batch}"


def against_dense(rows: Sequence[Row]) -> list[Row]:
    """The rows of one run with `x_unpatched` and `x_best` set: times relative to both dense variants."""
    return [Row(**row) for row in _against_dense([asdict(row) for row in rows])]


def added(old: dict[str, Any], new: dict[str, Any], path: Path) -> dict[str, Any]:
    """An earlier result with a new one. If both timed a variant at a length, or could not, the new one counts.

    Of the unpatched model the faster one counts, and all rows are compared with that.

    Args:
        old: what `as_json` made earlier, read from `path`.
        new: what `as_json` makes now.
        path: the file, for messages.

    Raises:
        TaskError: the two runs had different models or machines, or used one label for two configurations.
    """
    new = json.loads(json.dumps(new))  # as it will be read
    check_same_run(old, new, path, lambda config: config)
    slower = _slower_unpatched(old, new)
    new = {**new, "rows": [row for row in new["rows"] if _measured(row) not in slower]}
    settled = timed_in(new)
    kept = [row for row in old["rows"] if _measured(row) not in settled]
    skipped = {
        what: [length for length in lengths if (what.rpartition(": ")[0], length) not in settled]
        for what, lengths in old["skipped"].items()
    }
    for what, lengths in new["skipped"].items():
        skipped[what] = sorted([*skipped.get(what, []), *lengths])
    return {
        **new,
        "configs": {**old["configs"], **new["configs"]},
        "skipped": {what: lengths for what, lengths in skipped.items() if lengths},
        "rows": _against_dense([*kept, *new["rows"]]),
    }


def _measured(row: dict[str, Any]) -> tuple[str, int]:
    return name_of(row["label"], row["mode"], row["batch"]), row["length"]


def _slower_unpatched(old: dict[str, Any], new: dict[str, Any]) -> set[tuple[str, int]]:
    """What the new result timed of the unpatched model, more slowly than the old one."""
    before = {_measured(row): row["token_ms"] for row in old["rows"] if row["label"] == UNPATCHED}
    return {key for row in new["rows"] if (key := _measured(row)) in before and row["token_ms"] > before[key]}


def _against_dense(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `x_unpatched` by the unpatched model among them, and with `x_best` if their own run had none."""
    ms = {_measured(row): row["token_ms"] for row in rows if row["label"] in (UNPATCHED, BEST)}

    def by(row: dict[str, Any], label: str, mode: Mode) -> float | None:
        key = name_of(label, mode, row["batch"]), row["length"]
        return row["token_ms"] / ms[key] if key in ms else None

    return [
        {
            **row,
            "x_unpatched": by(row, UNPATCHED, without_patch(row["mode"])),
            "x_best": row["x_best"] or by(row, BEST, row["mode"]),
        }
        for row in rows
    ]


def timed_in(data: dict[str, Any]) -> set[tuple[str, int]]:
    """(Variant, mode and batch in words; length) of all that a result has timed or skipped."""
    timed = set(map(_measured, data["rows"]))
    skipped = data["skipped"].items()
    return timed | {(what.rpartition(": ")[0], length) for what, lengths in skipped for length in lengths}
