"""The page of the results: a symbol for each method and kind of layer, and notes."""

from typing import Any

from benchmarks.support.probe import LENGTH, NEW, NOT_ATTENTION, NOT_COMPILED

DESIGN = {"dense: sliding-window layer", "dense: chunked layer"}


def compact(measured: dict[str, Any]) -> dict[str, Any]:
    """The result of `measure`, with one answer if all ways give the same."""
    methods = {
        method: {
            kind: {phase: _one(by_way) for phase, by_way in by_phase.items()} for kind, by_phase in by_kind.items()
        }
        for method, by_kind in measured["methods"].items()
    }
    return {**measured, "methods": methods}


def _one(by_way: dict[str, str]) -> str | dict[str, str]:
    answers = set(by_way.values())
    return answers.pop() if len(answers) == 1 else by_way


SYMBOLS = {"sparse": "●", "design": "○", "none": "", "other": "✗"}
IN = {
    "forward": "in forwards by hand",
    "generate": "in `generate`",
    "static": "on a static cache",
    "compiled": "compiled",
}
PAGE = """# Models

This page shows what runs sparsely on which model, by kind of layer. It is measured, not written by hand: `make support`
runs each method on a tiny random model of every family and reads the sparsity reports. [support.json](support.json) has
every answer. A prompt of {length} tokens and {new} tokens of answer run in forwards by hand with a `DynamicCache`, and
through `generate` with the cache that it makes, with a static cache, and with a static cache whose decode step is
compiled (`fullgraph=True` and backend `eager`, which shows that it is one graph). An answer counts only if the logits
are right:

- In forwards by hand, the logits must equal those of the model's own eager attention under the masks of the plans that
  ran.
- With settings of the same method that keep everything, they must equal those of dense attention.
- In a compiled step, they must equal those of the same step uncompiled.

Symbols in the table:

- ● sparse in every way to run it
- ○ dense by the model's design: the layer has its own window or chunks
- ✗ dense or refused, for the reason in the note
- empty: no causal self-attention (linear attention, cross-attention to an image); the layer runs as it is

{table}

{notes}

In methods whose layers choose for other layers (`tidaldecode`, `delta`, `lessismore`), ● stands for these other layers.
`generate` compiles only decode steps, never prefill. In your own `torch.compile`, prefill is sparse on a GPU, and with
spans on every device. Layers with shared keys read the keys of an earlier layer. When `generate` reads a prompt, the
layers with shared keys of Gemma 4 compute only its last token. On a GPU, the kernels that multiply whole queries and
keys support a head_dim of up to 256; wider layers (512 in Gemma 4) make and run the same plans in PyTorch.

Measured with torch {torch} and transformers {transformers} on a CPU in float32.
"""


def page(result: dict[str, Any]) -> str:
    """The Markdown page of the content of `support.json`."""
    families = list(result["families"].values())
    of_all = set.intersection(*(set(family["methods"]) for family in families)) - {"dense"}
    methods = [method for method in families[0]["methods"] if method in of_all]
    notes: list[str] = []
    lines = [
        f"| models | layers | {' | '.join(f'`{method}`' for method in methods)} |",
        f"|---|---|{'---|' * len(methods)}",
    ]
    for family in families:
        for i, kind in enumerate(family["layers"]):
            cells = [_cell(family["methods"][method][kind], notes) for method in methods]
            lines.append(f"| {family['models'] if i == 0 else ''} | {kind} | {' | '.join(cells)} |")
    numbered = "\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1))
    return PAGE.format(table="\n".join(lines), notes=numbered, length=LENGTH, new=NEW, **result["versions"])


def _cell(by_phase: dict[str, str | dict[str, str]], notes: list[str]) -> str:
    """A symbol, and the number of its note if it needs one."""
    answers = answers_of(by_phase)
    ran = answers - {NOT_COMPILED}
    symbol = (
        "none" if ran == {NOT_ATTENTION} else "design" if ran <= DESIGN else "sparse" if "sparse" in ran else "other"
    )
    if answers <= DESIGN or answers in ({"sparse"}, {NOT_ATTENTION}):
        return SYMBOLS[symbol]
    said = {phase: _said(found) for phase, found in by_phase.items()}
    alike = len(set(said.values())) == 1
    note = said.popitem()[1] if alike else "; ".join(f"{phase}: {found}" for phase, found in said.items())
    if note not in notes:
        notes.append(note)
    return f"{SYMBOLS[symbol]} <sup>{notes.index(note) + 1}</sup>"


def answers_of(by_phase: dict[str, str | dict[str, str]]) -> set[str]:
    """All answers of a method in layers of one kind."""
    return {answer for found in by_phase.values() for answer in ([found] if isinstance(found, str) else found.values())}


def _said(found: str | dict[str, str]) -> str:
    if isinstance(found, str):
        return found
    ways: dict[str, list[str]] = {}
    for way, answer in found.items():
        if answer != NOT_COMPILED:
            ways.setdefault(answer, []).append(IN[way])
    said = list(ways) if len(ways) == 1 else [f"{answer} {' and '.join(where)}" for answer, where in ways.items()]
    return ", ".join([*said, NOT_COMPILED] if NOT_COMPILED in found.values() else said)
