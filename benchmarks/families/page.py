"""The page of the results, the totals, and the one-line summary of a class."""

from collections.abc import Sequence
from typing import Any

from benchmarks.families.generating import LENGTH, NEW, PADDING
from benchmarks.families.probe import DENSE, LATE, RAW, REFUSED, SPARSE, TOLERANCE, UNTRUE, WRONG
from benchmarks.families.settings import KINDS
from benchmarks.families.sweep import Found

FAULTS = (WRONG, RAW, LATE, UNTRUE)
SYMBOLS = {SPARSE: "●", DENSE: "○", REFUSED: "□", **dict.fromkeys(FAULTS, "✗")}
PAGE = """# Families

This page shows every causal class of Transformers {transformers} with every method. It is measured, not written by
hand: `make families` builds a tiny random model of each class by rules about the names of config fields, and runs each
method on it through `generate`. [families.json](families.json) has every answer. There are two prompts of {length}
tokens, one left-padded by {padding} tokens, and {new} tokens of answer. An answer counts only if the logits are right,
to a relative RMS of {tolerance}:

- With settings that leave keys out, the logits must equal those of the model's own eager attention under the masks of
  the plans that ran.
- With settings that keep everything, they must equal those of the unpatched model. This is also checked for one prompt
  without a batch, on a static cache if the unpatched class answers the same with one.
- After all patches are undone, they must equal those from before the patches, bit for bit.

{totals}

Symbols in the table:

- ● sparse; the methods are {methods}
- ○ right, but dense in every call, for the reason in the note
- □ refused when the model is patched, for the reason in the note
- ✗ a fault: wrong logits, an exception that is not ours, a refusal in the middle of `generate`, or a refusal whose
  reason is not true for the model

If the methods of a kind differ, a number after the symbol says how many of them it stands for.

{table}

{notes}

## No tiny model

{missing}

Measured with torch {torch} and transformers {transformers} on a CPU in float32. [models.md](models.md) shows what is
sparse by kind of layer, in forwards by hand and compiled.
"""


def status_of(found: Found) -> str:
    """The status of a class: "not shrunk", or its worst fault, or "refused" if no method runs, or else "right"."""
    if "not shrunk" in found:
        return "not shrunk"
    outcomes = [_head(outcome) for outcome in found["methods"]]
    faults = [fault for fault in FAULTS if fault in outcomes]
    if faults:
        return faults[0]
    return REFUSED if set(outcomes) == {REFUSED} else "right"


def _head(outcome: str) -> str:
    return outcome.partition(":")[0]


def totals_of(families: dict[str, Found]) -> dict[str, int]:
    """The number of classes of each status."""
    statuses = [status_of(found) for found in families.values()]
    counted = ("right", REFUSED, "not shrunk", *FAULTS)
    return {"tried": len(statuses), **{status: statuses.count(status) for status in counted}}


def said_totals(totals: dict[str, int]) -> str:
    """The totals as one line."""
    return (
        f"Classes tried: {totals['tried']}. Right: {totals['right']}. Refused with the reason: {totals[REFUSED]}. "
        f"No tiny model: {totals['not shrunk']}. Wrong: {totals[WRONG]}. Exceptions that are not ours: {totals[RAW]}. "
        f"Refused late: {totals[LATE]}. Refused with an untrue reason: {totals[UNTRUE]}."
    )


def page(result: dict[str, Any]) -> str:
    """The Markdown page of the content of `families.json`."""
    families = result["families"]
    notes: list[str] = []
    kinds = {kind: of for kind, of in KINDS.items() if kind != "dense"}
    lines = [f"| class | tiny model | {' | '.join(kinds)} |", f"|---|---|{'---|' * len(kinds)}"]
    for name, found in families.items():
        if "methods" in found:
            cells = [_cell(name, found["methods"], methods, notes) for methods in kinds.values()]
            lines.append(f"| {name} | {found['model']} | {' | '.join(cells)} |")
    missing = [f"- {name}: {found['not shrunk']}" for name, found in families.items() if "not shrunk" in found]
    return PAGE.format(
        table="\n".join(lines),
        notes="\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1)),
        missing="\n".join(missing),
        totals=said_totals(result["totals"]),
        methods="; ".join(f"{kind} {', '.join(f'`{method}`' for method in of)}" for kind, of in kinds.items()),
        **{"length": LENGTH, "padding": PADDING, "new": NEW, "tolerance": TOLERANCE},
        **result["versions"],
    )


def _cell(name: str, outcomes: dict[str, list[str]], methods: Sequence[str], notes: list[str]) -> str:
    """A symbol for each outcome of a kind's methods, their number if outcomes differ, and the note numbers."""
    cells = []
    of_kind = {outcome: [method for method in of if method in methods] for outcome, of in outcomes.items()}
    of_kind = {outcome: of for outcome, of in of_kind.items() if of}
    for outcome, of in of_kind.items():
        cell = SYMBOLS[_head(outcome)] + (f" {len(of)}" if len(of_kind) > 1 else "")
        note = outcome.partition(": ")[2].replace(f"{name}: ", "")
        if note:
            if note not in notes:
                notes.append(note)
            cell += f" <sup>{notes.index(note) + 1}</sup>"
        cells.append(cell)
    return ", ".join(cells)


def said(found: Found) -> str:
    """The result of a class as one line."""
    if "not shrunk" in found:
        return str(found["not shrunk"])
    return "; ".join(f"{len(methods)} {outcome}" for outcome, methods in found["methods"].items())
